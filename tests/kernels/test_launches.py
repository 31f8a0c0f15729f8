"""What a launch costs beside its work: kernels are compiled once for all batches, and a compiler sees through launches."""

import pytest
import torch
from torch.utils import _triton

from kernels import backend, guided_step, supcon_kernels, views_kernel
from kernels.group_norm import group_norm_silu
from kernels.pixels import pixels

pytestmark = pytest.mark.skipif(
    backend.triton is None or backend.interpreted(), reason="needs Triton's compiler, not its interpreter"
)
CHANGING = {  # integers that another batch changes, and extents that must stay known for wide loads
    supcon_kernels._prepare_kernel: (("R", "images"), "E"),
    supcon_kernels._forward_kernel: (("groups", "run"), "WIDTH"),
    supcon_kernels._merge_kernel: (("groups", "splits"), "BLOCK"),
    supcon_kernels._backward_kernel: (("R", "groups", "run"), "E"),
    views_kernel._views_kernel: (("B",), "W"),
    guided_step._guided_step_kernel: (("rows", "unconditional_rows"), "plane"),
}


def key(kernel, **integers) -> str:
    """What Triton looks a compiled kernel up by, with every integer 32 but those given."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    arguments = {name: integers.get(name, 32) for name in kernel.arg_names}
    return str(binder(**arguments, debug=False)[1])


@pytest.mark.parametrize("kernel", CHANGING, ids=lambda kernel: kernel.__name__)
def test_another_batch_never_compiles_a_kernel_anew(kernel):
    changing, known = CHANGING[kernel]
    for name in changing:
        assert key(kernel, **{name: 1}) == key(kernel, **{name: 150}) == key(kernel)
    assert key(kernel, **{known: 150}) != key(kernel), "the key does not see alignment, so nothing was shown"


class Traced(Exception):
    """Ends a call where it would run what was traced."""


z, w = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4)
CALLS = {
    "group_norm": (3, lambda: group_norm_silu(z, 2, w, w, implementation="triton")),
    "pixels": (1, lambda: pixels(z[:, :3], 2, implementation="triton")),
    "guided_step": (
        1,
        lambda: guided_step.guided_step(
            z, z, z.clone(), z.clone(), torch.ones(3, 8), torch.tensor([0, 1]), torch.ones(2), implementation="triton"
        ),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_compiler_traces_launches_without_a_break(op, monkeypatch):
    """A break at every kernel of a compiled UNet would cost more than the kernel gains."""
    launches, call = CALLS[op]
    found = []

    def record(graph, _inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if "triton_kernel" in str(node.target))

        def run(*_):
            raise Traced

        return run

    monkeypatch.setattr(backend, "_obstacle", lambda kind: "")
    monkeypatch.setattr(_triton, "has_triton", lambda: True)  # torch asks whether there is a GPU to run it
    torch._dynamo.reset()
    with pytest.raises(Traced):
        torch.compile(call, backend=record, fullgraph=True)()
    assert len(found) == launches
