"""Memory that ran out is told apart from other failures."""

from __future__ import annotations

import pytest
import torch

from paca.pretrained.out_of_memory import failure_reason, is_out_of_memory, says_out_of_memory


def test_the_error_of_the_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**45, dtype=torch.float64)  # 256 TiB: more than a process can address
    assert type(raised.value) is RuntimeError  # of no class of its own
    assert is_out_of_memory(raised.value)
    assert failure_reason(raised.value) == "out of memory"
    assert says_out_of_memory(str(raised.value))


def test_the_errors_of_cuda_and_of_python_are_recognised() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert says_out_of_memory("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert says_out_of_memory("MemoryError")
    for words in (
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
        "Cannot allocate memory",
    ):
        assert says_out_of_memory(f"RuntimeError: {words}")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
    ],
)
def test_errors_of_libraries_on_a_gpu_are_recognised(words: str) -> None:
    """torch raises the first as an AcceleratorError, which is a RuntimeError and no OutOfMemoryError."""
    assert is_out_of_memory(RuntimeError(words))
    assert failure_reason(RuntimeError(words)) == "out of memory"


def test_other_errors_keep_their_name_and_first_line() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand a long trace")
    assert not is_out_of_memory(error)
    assert failure_reason(error) == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    assert not says_out_of_memory(str(error))
