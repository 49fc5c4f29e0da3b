"""attnfast: exact softmax attention, forward and backward, in memory linear in sequence length.

See `attention` for the contract, `explain` for which backend runs a call and why,
`MultiheadAttention` and `replace` for the drop-in module.
"""

from . import flops, sharding
from ._version import __version__
from .block_mask import BlockMask
from .explain import explain
from .functional import attention, decode_attention, varlen_attention
from .late_imports import when_imported
from .nn.attention import MultiheadAttention
from .nn.cache import KVCache
from .nn.replace import replace, restore
from .sdpa import scaled_dot_product_attention
from .stats import AttentionStats
from .warm_up import warm_up

when_imported("torch.utils.flop_counter", flops.register)
when_imported("torch.distributed.tensor", sharding.register)

__all__ = [
    "AttentionStats",
    "BlockMask",
    "KVCache",
    "MultiheadAttention",
    "__version__",
    "attention",
    "decode_attention",
    "explain",
    "replace",
    "restore",
    "scaled_dot_product_attention",
    "varlen_attention",
    "warm_up",
]
