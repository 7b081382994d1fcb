"""Kernels we did not write, unchanged: QuACK's (CuTe DSL) and a Triton kernel, emulated and compared with torch."""

import pytest

torch = pytest.importorskip("torch")
cutlass = pytest.importorskip("cutlass")

import cutlass.cute as cute  # noqa: E402

import ptxsim  # noqa: E402

pytestmark = pytest.mark.peers
CHECKED = dict(racecheck=True)  # not initcheck: QuACK's reductions read shared rows that lie past the batch, unused


def compile_peer(monkeypatch, compile_function, *args, **kwargs):
    """Run a library's own compile function up to ``cute.compile`` and give what it passes there to ptxsim."""
    passed = []
    with monkeypatch.context() as patch:
        patch.setattr(cute, "compile", lambda *a, options="", **k: passed.append(a))
        getattr(compile_function, "__wrapped__", compile_function)(*args, **kwargs)
    return ptxsim.compile(*passed[0])


@pytest.fixture
def quack(monkeypatch):
    monkeypatch.setenv("QUACK_ARCH", "90")
    return pytest.importorskip("quack")


@pytest.mark.parametrize("options", [{}, dict(async_mode="late", schedule=1), CHECKED], ids=str)
@pytest.mark.parametrize("rows,columns", [(5, 1000), (2, 4096)])
def test_quack_softmax(quack, monkeypatch, rows, columns, options):
    from quack.softmax import Softmax

    kernel = compile_peer(monkeypatch, Softmax.compile, cutlass.BFloat16, cutlass.BFloat16, columns)
    x = torch.randn(rows, columns).bfloat16()
    out = torch.empty_like(x)
    with ptxsim.emulate(**options):
        kernel(x, out)
    torch.testing.assert_close(out.float(), x.float().softmax(1), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("columns,options", [(1024, {}), (1024, CHECKED), (32768, {})], ids=str)
def test_quack_rmsnorm(quack, monkeypatch, columns, options):
    """The wide case runs as a cluster that reduces through distributed shared memory."""
    from quack.rmsnorm import _compile_rmsnorm_fwd

    bf16 = cutlass.BFloat16
    kernel = compile_peer(
        monkeypatch,
        _compile_rmsnorm_fwd,
        bf16,
        bf16,
        None,
        cutlass.Float32,
        None,
        None,
        columns,
        False,
        False,
        False,
        False,
    )
    x, weight = torch.randn(3, columns).bfloat16(), torch.randn(columns)
    out = torch.empty_like(x)
    with ptxsim.emulate(**options) as session:
        kernel(x, weight, None, None, out, None, None, None, 1e-6)
    want = torch.nn.functional.rms_norm(x.float(), (columns,), weight, 1e-6)
    torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=1e-2)
    assert (session.launches[-1].cluster_size > 1) == (columns > 16384)


@pytest.mark.parametrize("options", [{}, dict(async_mode="late", schedule=2), CHECKED], ids=str)
@pytest.mark.parametrize(
    "cluster,pingpong,registers", [((1, 1, 1), False, False), ((2, 1, 1), True, False), ((1, 1, 1), False, True)]
)
def test_quack_gemm_sm90(quack, monkeypatch, cluster, pingpong, registers, options):
    """Persistent, warp-specialised: TMA loads (multicast in a cluster), wgmma (A in shared memory or registers)."""
    from quack import gemm
    from quack.gemm_default_epi import GemmDefaultSm90
    from quack.gemm_tvm_ffi_utils import make_scheduler_args
    from quack.rounding import RoundingMode

    class FromRegisters(GemmDefaultSm90):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, mma_is_rs=True, **kwargs)

    if registers:
        monkeypatch.setattr(gemm, "GemmDefaultSm90", FromRegisters)
    bf16 = cutlass.BFloat16
    kernel = compile_peer(
        monkeypatch,
        gemm._compile_gemm.__wrapped__,
        bf16,
        bf16,
        bf16,
        None,
        "k",
        "k",
        "n",
        None,
        (128, 128),
        cluster,
        pingpong,
        True,
        False,
        None,
        None,
        None,
        0,
        0,
        False,
        (),
        False,
        False,
        False,
        False,
        False,
        (9, 0),
        RoundingMode.RN,
        0,
        None,
    )
    m, n, k = 384, 256, 192
    a, b = torch.randn(1, m, k).bfloat16(), torch.randn(1, n, k).bfloat16()
    out = torch.full((1, m, n), float("nan")).bfloat16()
    epilogue = GemmDefaultSm90.EpilogueArguments()
    with ptxsim.emulate(**options):
        kernel(a, b, out, None, epilogue, make_scheduler_args(2, 8, None), None, None, None, None)
    want = a.float() @ b.float().mT
    torch.testing.assert_close(out.float(), want, atol=0.15, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, CHECKED], ids=str)
def test_triton_kernel(options):
    """A state update written in Triton, compiled for sm_90."""
    triton = pytest.importorskip("triton")
    from triton import language as tl

    from ptxsim.triton_hook import emulate_triton

    @triton.jit
    def step(state, x, b, out, decay, N: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, N)
        weights = tl.load(b + column)
        new = tl.load(state + row * N + column) * decay + tl.load(x + row) * weights
        tl.store(state + row * N + column, new)
        tl.store(out + row, tl.sum(new))

    state, x, b, out = torch.randn(6, 64), torch.randn(6), torch.randn(64), torch.zeros(6)
    want_state = state * 0.5 + x[:, None] * b
    with emulate_triton(**options):
        step[(6,)](state, x, b, out, 0.5, N=64)
    torch.testing.assert_close(state, want_state)
    torch.testing.assert_close(out, want_state.sum(1), atol=1e-4, rtol=1e-4)
