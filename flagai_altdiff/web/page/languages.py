"""A prompt in each language, for a beginning; the embedded model can draw all of them. Plain data."""

EXAMPLES = {
    "العربية": "أناناس، خلفية زرقاء",
    "Deutsch": "Pinguin, blauer Hintergrund",
    "English": "camel, yellow background",
    "Español": "pizza, fondo blanco",
    "Français": "croissant, fond bleu",
    "हिन्दी": "हाथी, पीली पृष्ठभूमि",
    "Italiano": "barca a vela, sfondo arancione",
    "日本語": "傘、緑色の背景",
    "한국어": "호랑이, 파란색 배경",
    "Nederlands": "fiets, gele achtergrond",
    "Polski": "gitara, białe tło",
    "Português": "rosto de leão, fundo roxo",
    "Русский": "кошка, красный фон",
    "ไทย": "มะม่วง, พื้นหลังสีน้ำเงิน",
    "Türkçe": "lale, beyaz arka plan",
    "Українська": "соняшник, фіолетове тло",
    "Tiếng Việt": "cá heo, nền màu cam",
    "中文": "火箭，黄色背景",
}
"""Language, in itself → prompt."""
