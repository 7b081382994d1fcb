"""Small kernels, compiled to objects and loaded as on a GPU."""

import functools
import tempfile
from pathlib import Path

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import load_module, make_fake_stream, make_fake_tensor

THREADS = 128


class Shift:
    """out[i] = x[i + offset] + 1 while i < n."""

    def __init__(self, shared=0, cluster=1, pdl=False, wait=True):
        self.shared, self.cluster, self.pdl, self.wait = shared, cluster, pdl, wait

    def fakes(self):
        n = cute.sym_int64()
        x, out = (make_fake_tensor(cutlass.Float32, (n,), (1,)) for _ in range(2))
        return x, out, cutlass.Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, offset: cutlass.Int32, stream):
        self.kernel(x, out, offset).launch(
            grid=[cute.round_up(cute.ceil_div(cute.size(x), THREADS), self.cluster), 1, 1],
            block=[THREADS, 1, 1],
            cluster=[self.cluster, 1, 1],
            smem=self.shared,
            use_pdl=self.pdl,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor, offset: cutlass.Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        if cutlass.const_expr(self.pdl and self.wait):
            cute.arch.griddepcontrol_wait()
        i = block * THREADS + thread
        if i < cute.size(x):
            out[i] = x[i + offset] + 1.0


class LoadTile:
    """out = the first 8 x 32 elements of x, which come by a tensor map."""

    def fakes(self):
        x = make_fake_tensor(
            cutlass.Float32, (cute.sym_int(), cute.sym_int()), (cute.sym_int64(divisibility=4), 1), assumed_align=16
        )
        out = make_fake_tensor(cutlass.Float32, (8, 32), (32, 1))
        return x, out, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, stream):
        layout = cute.make_layout((8, 32), stride=(32, 1))
        atom, view = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, layout, (8, 32))
        self.kernel(atom, view, out, layout).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, atom: cute.CopyAtom, view: cute.Tensor, out: cute.Tensor, layout: cute.Layout):
        thread, _, _ = cute.arch.thread_idx()
        smem = cutlass.memory.SmemAllocator()
        tile = smem.allocate_tensor(cutlass.Float32, layout, byte_alignment=128)
        full = smem.allocate_array(cutlass.Int64, 1)
        if thread == 0:
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        shared, source = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2),
            cute.group_modes(cute.local_tile(view, (8, 32), (0, 0)), 0, 2),
        )  # fmt: skip
        if thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, 8 * 32 * 4)
        cute.copy(atom, source, shared, tma_bar_ptr=full)
        cute.arch.mbarrier_wait(full, 0)
        for row in range(8):
            out[row, thread] = tile[row, thread]


@functools.cache
def built(kind, arch="sm_90a", **options):
    """Return the bytes of a kernel's object."""
    kernel = kind(**options)
    compiled = cute.compile(kernel, *kernel.fakes(), options=f"--enable-tvm-ffi --gpu-arch {arch}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        compiled.export_to_c(str(path), function_name="kernel")
        return path.read_bytes()


def loaded(kind, arch="sm_90a", **options):
    """Return a kernel whose library no call has loaded yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        path.write_bytes(built(kind, arch, **options))
        return load_module(str(path), enable_tvm_ffi=True)["kernel"]
