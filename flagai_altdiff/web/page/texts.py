"""What the page says, in English and Chinese. Options speak English by their one definition. Plain data."""

from __future__ import annotations

from flagai_altdiff.request import OPTIONS

LANGUAGES = {"en": "English", "zh": "中文"}

_PAGE = {
    "prompt": ("Prompt", "提示词"),
    "prompt_help": (
        "What the images show, in any of the model's languages.",
        "图像的内容，可以使用模型支持的任何语言。",
    ),
    "examples": ("Examples", "示例"),
    "draw": ("Draw", "绘制"),
    "cancel": ("Cancel", "取消"),
    "more": ("More options", "更多选项"),
    "model": ("Model", "模型"),
    "model_help": ("Which model draws.", "使用哪个模型绘制。"),
    "lora": ("LoRAs", "LoRA"),
    "lora_help": ("Additions to the model.", "对模型的附加权重。"),
    "lora_strength": ("How strong it is; 0 leaves it out.", "强度；0 表示不使用。"),
    "picture": ("Picture to begin with", "起始图片"),
    "picture_help": (
        "Upload or paste a picture. Paint over what is to be drawn anew; paint nothing to change all of it.",
        "上传或粘贴一张图片。涂抹需要重绘的部分；不涂抹则改变整张图片。",
    ),
    "images": ("Images", "图像"),
    "again": ("Again", "再画一次"),
    "near": ("Near", "相近"),
    "edit": ("Send to edit", "送去编辑"),
    "history": ("History", "历史"),
    "older": ("Older", "更早的"),
    "tokens": ("How the prompt is read", "提示词的读法"),
    "long": ("Long image; scroll it from side to side", "长图；可左右滚动"),
    "language": ("Language", "语言"),
    "default": ("the model's own", "模型默认"),
}
_SAYINGS = {
    "idle": ("Ready.", "就绪。"),
    "waiting": ("Waiting: {position} before this one.", "排队中：前面还有 {position} 个。"),
    "drawing": ("Step {step} of {steps}{left}", "第 {step} 步，共 {steps} 步{left}"),
    "left": (", {seconds} s left", "，还需 {seconds} 秒"),
    "done": ("Done in {seconds} s.", "完成，用时 {seconds} 秒。"),
    "cancelled": ("Cancelled.", "已取消。"),
    "choose": ("Choose an image first.", "请先选择一张图像。"),
    "of_a_batch": (
        "This image took its noise after others of its batch, so it cannot be drawn alone; altdiff redraw repeats it.",
        "这张图像的噪声取自同批其他图像之后，无法单独重绘；请用 altdiff redraw 重画。",
    ),
    "cut": ("cut off", "被截断"),
    "unknown": ("{model} knows nothing of that name.", "{model} 不认识其中的任何事物。"),
    "names_near": (" Try: {names}.", " 试试：{names}。"),
    "chunk": ("{count} of {room} tokens", "{count} / {room} 个词元"),
    "seed": ("seed {seed}", "种子 {seed}"),
    "steps": ("{steps} steps", "{steps} 步"),
    "empty": ("Type a prompt, or choose an example.", "请输入提示词，或选择一个示例。"),
    "interrupted": ("Interrupted before it was drawn", "绘制前被中断"),
}
_OPTIONS = {
    "negative_prompt": ("反向提示词", "图像中不应出现的内容。"),
    "height": ("高度", "图像的高度（像素）。"),
    "width": ("宽度", "图像的宽度（像素）。"),
    "steps": ("步数", "采样步数；越多越精细，也越慢。"),
    "guidance_scale": ("引导强度", "对提示词的遵循程度；1 表示关闭引导。"),
    "sampler": ("采样器", "从噪声到图像的算法。"),
    "grid": ("步长网格", "各步所在的位置：FlagAI 的网格，或以无噪声结束的网格。"),
    "eta": ("eta", "DDIM 中新噪声的比例。"),
    "seed": ("种子", "随机数的起点；-1 表示随机并记录。"),
    "seed_mode": ("种子方式", "batch：FlagAI 的数字。per_image：第 k 张图像的种子为 seed + k。"),
    "images_per_prompt": ("数量", "每个提示词的图像数。"),
    "batch_size": ("批大小", "同时绘制的图像数；不填则一次绘制全部。"),
    "iterations": ("轮数", "把所有提示词绘制多少遍。"),
    "fixed_code": ("固定噪声", "每一批都从同样的噪声开始。"),
    "variation_seed": ("变化种子", "混入的噪声，用来得到相近的图像。"),
    "variation_strength": ("变化强度", "混入多少这种噪声；1 表示完全不同的图像。"),
    "prompt_syntax": ("提示词语法", "plain：原样读取；weighted：支持 (词:1.3)、[词] 和 BREAK，长度不限。"),
    "strength": ("重绘强度", "离开原图多远；1 表示完全重绘。"),
    "full_steps": ("完整步数", "在强度所剩的路程上走完全部步数。"),
    "fit": ("适配方式", "比例不同的图片如何适配。"),
    "ground": ("底色", "透明处和填充处的颜色：名称或 #rrggbb。"),
    "mask_feather": ("边缘柔化", "蒙版内柔和边缘的宽度（像素）。"),
    "mask_full_resolution": ("全分辨率重绘", "只绘制蒙版区域，放大到整张图像的大小，再放回去。"),
    "mask_padding": ("周边留边", "此时一并绘制的蒙版周边宽度（像素）。"),
    "outpaint": ("向外扩展", "在图片四周扩展的像素，例如 left=128,right=64。"),
    "window": ("窗口", "用重叠的窗口绘制比模型擅长的尺寸更大的图像（像素）。"),
    "window_overlap": ("窗口重叠", "相邻窗口重叠多少；不填则为一半。"),
    "stretches": ("分段提示词", "提示词中的 | 是图像从左到右各部分的分界；需要窗口。"),
    "seamless": ("无缝", "哪些边在对边继续。"),
    "hires": ("高清放大", "绘制、放大若干倍，再细化。"),
    "hires_strength": ("细化强度", "细化离开放大结果多远。"),
    "cache_interval": ("缓存间隔", "UNet 的内层每隔多少步才计算一次：更快，但图像不同。"),
    "guidance_interval": (
        "引导区间",
        "从噪声 (0) 到图像 (1) 的路程中使用引导的部分，例如 0.1-0.8；其余部分只需一半计算。",
    ),
    "token_merging": ("词元合并", "最大特征图的自注意力中合并的词元比例；适合大图像。"),
    "engine": ("引擎", "由谁计算：原样的模型、为处理器重排权重的模型、OpenVINO，或 torch 的编译器；图像除舍入外相同。"),
    "hires_upscaler": ("放大对象", "放大的是图片，还是潜变量（需要更大的强度）。"),
}


def option_label(name: str, language: str) -> str:
    """What an option is called."""
    return _OPTIONS[name][0] if language == "zh" else name.replace("_", " ").capitalize()


def option_help(name: str, language: str) -> str:
    """What an option is for."""
    option = OPTIONS[name]
    if language == "zh":
        return _OPTIONS[name][1] + (f"（{option.limits.replace(' to ', ' 至 ')}）" if option.limits else "")
    return option.help + (f" ({option.limits})" if option.limits else "")


def said(key: str, language: str, **values: object) -> str:
    """A text of the page."""
    return (_PAGE | _SAYINGS)[key][language == "zh"].format(**values)


def language_of(accepted: str) -> str:
    """The page's language for an ``Accept-Language``."""
    first = accepted.partition(",")[0].strip().lower()
    return "zh" if first.startswith("zh") else "en"
