"""A prompt in each language, for a beginning; the embedded model can draw all of them. Plain data."""

EXAMPLES = {
    "العربية": "قلب أخضر كبير على خلفية بيضاء",
    "Deutsch": "ein weißes Kreuz links auf violettem Hintergrund",
    "English": "a large red heart on a white background",
    "Español": "un círculo amarillo a la izquierda sobre un fondo blanco",
    "Français": "un grand croissant de lune violet sur un fond jaune",
    "हिन्दी": "बाईं ओर पीली पृष्ठभूमि पर एक बड़ा लाल दिल",
    "Italiano": "un piccolo cerchio bianco su uno sfondo arancione",
    "日本語": "青い背景の左側の大きな紫色の三角形",
    "한국어": "주황색 배경 왼쪽에 작은 흰색 정사각형",
    "Nederlands": "een rode ring links op een gele achtergrond",
    "Polski": "duży fioletowy półksiężyc po prawej stronie na czarnym tle",
    "Português": "um coração vermelho à esquerda sobre um fundo verde",
    "Русский": "зелёное кольцо справа на фиолетовом фоне",
    "ไทย": "ดอกไม้สีขาวขนาดใหญ่ทางขวาบนพื้นหลังสีม่วง",
    "Türkçe": "yeşil arka plan üzerinde büyük turuncu bir kare",
    "Українська": "синій будинок ліворуч на помаранчевому тлі",
    "Tiếng Việt": "trái tim lớn màu đỏ ở bên phải trên nền màu vàng",
    "中文": "蓝色背景上的黄色的大星星",
}
"""Language, in itself → prompt."""
