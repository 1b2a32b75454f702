"""The platform that SGLang runs on without a GPU. Loaded by SGLang, by its name."""

from typing import Any

import psutil
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform


class CpuPlatform(SRTPlatform):
    """Every operator in its native form, and the plain memory pools."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:  # noqa: ARG002 - SGLang's
        return psutil.virtual_memory().total

    def get_current_memory_usage(self, device: Any = None) -> int:  # noqa: ARG002
        memory = psutil.virtual_memory()
        return memory.total - memory.available

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_mha_kv_pool_cls(self) -> Any:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> Any:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
        from sglang.srt.models.deepseek_common.attention_backend_handler import (
            AttentionBackendRegistry,
            AttnForwardMethod,
        )

        # Else SGLang expands keys and values, and torch's attention looks for them in the pool.
        AttentionBackendRegistry.register(
            "torch_native", lambda _layer, _batch: AttnForwardMethod.MLA
        )

        class LatentPool(MLATokenToKVPool):
            """Without an index for sparse attention."""

            def __init__(self, size: int, index_head_dim: None, **arguments: Any) -> None:
                assert index_head_dim is None
                super().__init__(size, **arguments)

        return LatentPool

    def get_paged_allocator_cls(self) -> Any:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        class TokenAllocator(TokenToKVPoolAllocator):
            """Pages of one token."""

            def __init__(self, size: int, page_size: int, **arguments: Any) -> None:
                assert page_size == 1
                super().__init__(size, **arguments)

        return TokenAllocator
