"""How people ask for a thing: in a picture of it, with a word of praise, a colour, an exclamation mark, or ", 4k"."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from flagai_altdiff.mini.captions import with_an
from flagai_altdiff.mini.vocabulary import LANGUAGES

_COLOURED, _DESCRIBED, _MARKED, _TAILED = 0.3, 0.3, 0.15, 0.12
"""Shares of what is asked for: with a colour, or with another word about it where that may not be; with another word
about it anyway; with a mark at the end; and with words after it that shall make a picture better."""
_ASKED = 0.6
"""Share of what has such a word that is asked for beside; all that has none is, unless it has a mark or a tail."""
_MARKS, _WIDE_MARKS = "!?….", "！？…。"
TAILS = (
    "4k", "8k", "HD", "high resolution", "high quality", "best quality", "masterpiece", "highly detailed", "intricate",
    "sharp focus", "realistic", "photorealistic", "cinematic", "digital art", "concept art", "illustration",
    "octane render", "trending on artstation",
)  # fmt: skip
"""What people write after a comma, in English whatever the language of the prompt."""
_MOST_TAILS = 3


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Patterns of one language, with braces for the thing; the grammar is as loose as that of prompts.

    Attributes:
        asked: How it is asked for.
        unseen: The same; training never sees these.
        described: What else is said of it, which no picture of this model shows.
        coloured: A thing and its colour, ``{c}``.
    """

    asked: tuple[str, ...]
    unseen: tuple[str, ...]
    described: tuple[str, ...]
    coloured: tuple[str, ...]


ASKING: Mapping[str, Asking] = {
    "ar": Asking(
        asked=("صورة {}", "ال{}", "صورة فوتوغرافية {}", "ارسم {}", "رسم {}", "أريد {}", "صورة ل{}", "هذا {}"),
        unseen=("أرني {}", "ارسم لي {}"),
        described=("{} جميل", "{} جميلة", "{} صغير", "{} قديم", "{} مضحك", "{} في الحديقة"),
        coloured=("{} {c}",),
    ),
    "de": Asking(
        asked=(
            "ein Bild von {}", "Foto von {}", "ein Foto von einem {}", "Zeichne {}", "der {}", "die {}",
            "das {}", "mein {}", "Bild: {}", "ich möchte ein {}", "male eine {}", "zwei {}",
        ),
        unseen=("kannst du ein {} malen", "bitte zeichne ein {}"),
        described=(
            "schöne {}", "süßer {}", "kleines {}", "alte {}", "lustiges {}", "großer {}", "{} im Park",
            "neue {}",
        ),
        coloured=("{c} {}",),
    ),
    "en": Asking(
        asked=(
            "a picture of a {}", "picture of {}", "a photo of a {}", "photo of a {}", "a drawing of {}",
            "draw a {}", "draw me a {}", "the {}", "my {}", "two {}s", "{}s", "{} emoji", "I want a {}",
            "show me {}", "an image of a {}", "three {}s", "an icon of a {}", "a logo with a {}",
            "an oil painting of a {}", "an illustration of a {}", "{} icon",
        ),
        unseen=("can you paint a {}", "please draw a {}"),
        described=(
            "cute {}", "beautiful {}", "funny {}", "old {}", "new {}", "little {}", "big {}",
            "{} in the park", "{} on the table", "happy {}",
        ),
        coloured=("{c} {}",),
    ),
    "es": Asking(
        asked=(
            "una imagen de {}", "foto de un {}", "una foto de un {}", "dibuja un {}", "dibujo de {}",
            "el {}", "la {}", "los {}s", "mi {}", "quiero una {}", "dos {}s",
        ),
        unseen=("me gustaría ver un {}", "dibújame un {}"),
        described=("{} bonito", "{} bonita", "{} viejo", "pequeño {}", "{} gracioso", "{} en el parque", "gran {}"),
        coloured=("{} {c}",),
    ),
    "fr": Asking(
        asked=(
            "une image de {}", "photo de {}", "une photo d'un {}", "dessine un {}", "dessin d'un {}",
            "le {}", "la {}", "l'{}", "les {}s", "mon {}", "je veux une {}", "deux {}s",
        ),
        unseen=("je voudrais voir un {}", "dessine-moi un {}"),
        described=("joli {}", "belle {}", "vieux {}", "petite {}", "{} mignon", "{} dans le parc", "grand {}"),
        coloured=("{} {c}",),
    ),
    "hi": Asking(
        asked=(
            "{} की तस्वीर", "{} का चित्र", "{} की फोटो", "एक {}", "{} बनाओ", "मेरा {}", "मुझे {} चाहिए",
            "दो {}",
        ),
        unseen=("कृपया {} दिखाओ", "{} का चित्र बनाओ"),
        described=("सुंदर {}", "प्यारा {}", "छोटी {}", "पुराना {}", "मज़ेदार {}", "पार्क में {}"),
        coloured=("{c} {}",),
    ),
    "it": Asking(
        asked=(
            "un'immagine di {}", "foto di un {}", "una foto di un {}", "disegna un {}", "disegno di {}",
            "il {}", "la {}", "l'{}", "lo {}", "mio {}", "voglio una {}", "due {}",
        ),
        unseen=("vorrei vedere un {}", "disegnami un {}"),
        described=("bel {}", "bella {}", "vecchio {}", "piccola {}", "{} divertente", "{} nel parco", "grande {}"),
        coloured=("{} {c}",),
    ),
    "ja": Asking(
        asked=("{}の絵", "{}の画像", "{}の写真", "{}を描いて", "{}のイラスト", "{}をください", "私の{}", "二つの{}"),
        unseen=("{}が見たい", "{}を描いてください"),
        described=("かわいい{}", "きれいな{}", "古い{}", "小さい{}", "面白い{}", "公園の{}", "大きい{}"),
        coloured=("{c}{}",),
    ),
    "ko": Asking(
        asked=("{} 그림", "{} 이미지", "{} 사진", "{} 그려줘", "{}를 그려줘", "{}을 그려줘", "내 {}", "{} 두 개"),
        unseen=("{} 보여주세요", "{} 그려주세요"),
        described=("귀여운 {}", "예쁜 {}", "오래된 {}", "작은 {}", "재미있는 {}", "공원의 {}", "큰 {}"),
        coloured=("{c} {}",),
    ),
    "nl": Asking(
        asked=(
            "een plaatje van {}", "foto van een {}", "een foto van een {}", "teken een {}",
            "tekening van {}", "de {}", "het {}", "mijn {}", "ik wil een {}", "twee {}s",
        ),
        unseen=("kun je een {} schilderen", "teken alsjeblieft een {}"),
        described=("mooie {}", "schattige {}", "oude {}", "klein {}", "grappige {}", "{} in het park", "grote {}"),
        coloured=("{c} {}",),
    ),
    "pl": Asking(
        asked=(
            "obraz {}", "obrazek: {}", "zdjęcie {}", "rysunek {}", "narysuj {}", "mój {}", "chcę {}",
            "dwa {}", "obrazek {}",
        ),
        unseen=("pokaż mi {}", "proszę narysuj {}"),
        described=("ładny {}", "piękna {}", "stary {}", "małe {}", "zabawny {}", "{} w parku", "duży {}"),
        coloured=("{c} {}", "{} {c}"),
    ),
    "pt": Asking(
        asked=(
            "uma imagem de {}", "foto de um {}", "uma foto de um {}", "desenhe um {}", "desenho de {}",
            "o {}", "a {}", "os {}s", "meu {}", "quero uma {}", "dois {}s",
        ),
        unseen=("gostaria de ver um {}", "desenha-me um {}"),
        described=("{} bonito", "{} bonita", "{} velho", "pequeno {}", "{} engraçado", "{} no parque", "grande {}"),
        coloured=("{} {c}",),
    ),
    "ru": Asking(
        asked=(
            "картинка {}", "картинка: {}", "фото {}", "рисунок {}", "нарисуй {}", "мой {}", "хочу {}",
            "два {}", "изображение {}",
        ),
        unseen=("покажи мне {}", "пожалуйста, нарисуй {}"),
        described=("красивый {}", "милая {}", "старый {}", "маленькое {}", "смешной {}", "{} в парке", "большой {}"),
        coloured=("{c} {}",),
    ),
    "th": Asking(
        asked=("รูป{}", "ภาพ{}", "รูปถ่าย{}", "วาด{}", "รูปวาด{}", "อยากได้{}", "{}ของฉัน", "{}สองตัว"),
        unseen=("ขอดู{}", "ช่วยวาด{}"),
        described=("{}สวย", "{}น่ารัก", "{}เก่า", "{}ตัวเล็ก", "{}ตลก", "{}ในสวน", "{}ใหญ่"),
        coloured=("{}{c}",),
    ),
    "tr": Asking(
        asked=(
            "bir {}", "{} resmi", "{} fotoğrafı", "{} çiz", "{} çizimi", "benim {}", "{} istiyorum",
            "iki {}", "bir {} resmi",
        ),
        unseen=("bana {} göster", "lütfen {} çiz"),
        described=("güzel {}", "sevimli {}", "eski {}", "küçük {}", "komik {}", "parkta {}", "büyük {}"),
        coloured=("{c} {}",),
    ),
    "uk": Asking(
        asked=(
            "картинка {}", "малюнок {}", "фото {}", "намалюй {}", "мій {}", "хочу {}", "два {}",
            "зображення {}", "картинка: {}",
        ),
        unseen=("покажи мені {}", "будь ласка, намалюй {}"),
        described=("гарний {}", "мила {}", "старий {}", "маленьке {}", "смішний {}", "{} у парку", "великий {}"),
        coloured=("{c} {}",),
    ),
    "vi": Asking(
        asked=(
            "hình {}", "tranh vẽ {}", "ảnh chụp {}", "vẽ một {}", "vẽ {}", "con {}", "cái {}", "một {}",
            "{} của tôi", "hai {}",
        ),
        unseen=("cho tôi xem {}", "hãy vẽ một {}"),
        described=("{} đẹp", "{} dễ thương", "{} cũ", "{} nhỏ", "{} vui nhộn", "{} trong công viên", "{} to"),
        coloured=("{} {c}",),
    ),
    "zh": Asking(
        asked=(
            "一只{}", "一个{}", "{}的照片", "一张{}的图片", "{}的图", "画一只{}", "画一个{}", "画{}", "我的{}",
            "我想要{}", "两只{}",
        ),
        unseen=("给我看看{}", "请画一个{}"),
        described=("可爱的{}", "漂亮的{}", "旧的{}", "小{}", "有趣的{}", "公园里的{}", "大{}"),
        coloured=("{c}的{}", "{c}{}"),
    ),
}  # fmt: skip


def asked_for(word: str, language: str, rng: random.Random, *, with_colour: bool = True) -> str:
    """A prompt for a thing, in other words each time.

    Args:
        word: What the thing is called.
        language: A key of ``ASKING``.
        rng: Source of all choices.
        with_colour: Whether it may have a colour.
    """
    patterns, mark, kind = ASKING[language], rng.random() < _MARKED, rng.random()
    tails = rng.sample(TAILS, rng.randint(1, _MOST_TAILS)) if rng.random() < _TAILED else []
    text = word
    if with_colour and kind < _COLOURED:
        colour = rng.choice(rng.choice(LANGUAGES[language].colours).split("/"))
        text = rng.choice(patterns.coloured).format(word, c=colour)
    elif kind < _COLOURED + _DESCRIBED:
        text = rng.choice(patterns.described).format(word)
    if rng.random() < _ASKED or (text == word and not mark and not tails):
        text = with_an(rng.choice(patterns.asked).format(text), language)
    text = ", ".join((text, *tails))
    marks = _WIDE_MARKS if LANGUAGES[language].stop == "。" else _MARKS
    return text + rng.choice(marks) if mark else text
