"""Markers that transformers' own tests carry, so that `--strict-markers` knows them."""

import pytest

MARKERS = (
    "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test flash_attn_kernels_test is_agent_test "
    "is_expert_parallel_test is_fsdp_test is_pipeline_test is_staging_test is_tensor_parallel_test is_training_test "
    "order torch_compile_test"
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: transformers' own")
