"""Model configs by task, and the sizes, in pixels, that each task supports.

Names ending in `-toy` are small trained models, those in `-tiny` smaller ones with random weights: both take every path
of the program, on a CPU, in seconds.
"""

import copy
from typing import Any

from easydict import EasyDict

from .tiny import TINY_CONFIGS
from .toy import TOY_CONFIGS
from .wan_i2v_14B import i2v_14B
from .wan_t2v_1_3B import t2v_1_3B
from .wan_t2v_14B import t2v_14B


def _variant(config: EasyDict, name: str, **entries: Any) -> EasyDict:
    config = copy.deepcopy(config)
    config.update(entries, __name__=f"Config: {name}")
    return config


t2i_14B = _variant(t2v_14B, "Wan T2I 14B")
flf2v_14B = _variant(i2v_14B, "Wan FLF2V 14B", sample_neg_prompt="镜头切换，" + i2v_14B.sample_neg_prompt)

WAN_CONFIGS = {
    "t2v-14B": t2v_14B,
    "t2v-1.3B": t2v_1_3B,
    "i2v-14B": i2v_14B,
    "t2i-14B": t2i_14B,
    "flf2v-14B": flf2v_14B,
    "vace-1.3B": t2v_1_3B,
    "vace-14B": t2v_14B,
    **TOY_CONFIGS,
    **TINY_CONFIGS,
}

_HD = ("720*1280", "1280*720")
_SD = ("480*832", "832*480")
_TOY = ("80*48",)
_TINY = ("96*128", "128*96")

SUPPORTED_SIZES = {
    "t2v-14B": _HD + _SD,
    "t2v-1.3B": _SD,
    "i2v-14B": _HD + _SD,
    "flf2v-14B": _HD + _SD,
    "t2i-14B": _HD + _SD + ("1024*1024",),
    "vace-1.3B": _SD,
    "vace-14B": _HD + _SD,
    **dict.fromkeys(TOY_CONFIGS, _TOY),
    **dict.fromkeys(TINY_CONFIGS, _TINY),
}

# size -> (width, height), and size -> area, all that image tasks take from a size
SIZE_CONFIGS = {
    size: tuple(int(side) for side in size.split("*")) for size in _HD + _SD + ("1024*1024",) + _TOY + _TINY
}
MAX_AREA_CONFIGS = {
    size: width * height for size, (width, height) in SIZE_CONFIGS.items() if size != "1024*1024"
}
