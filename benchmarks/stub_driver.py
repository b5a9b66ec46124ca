"""A CUDA driver of our own, above which all of Triton's own launch runs as on a GPU.

It is a ``libcuda.so.1`` of a few lines of C, for machines that have neither a GPU nor its driver:
kernels are compiled, loaded and launched, and nothing computes but what the caller does at each
launch. Tensors are the CPU's, whose addresses Triton takes for a GPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess  # nosec B404
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from vstar_kernels.attention import triton as backend
from vstar_kernels.attention.triton import devices

GPU = devices.Device("sm_90", shared=232448, processors=132)
HEADERS = Path(nvidia.__file__).parent / "include"
SOURCE = r"""
#include <cuda.h>
#include <string.h>

typedef int (*launch_t)(unsigned programs, unsigned threads, unsigned shared, CUfunction f,
                        void **parameters);
static launch_t at_launch;

void call_at_launch(launch_t given) { at_launch = given; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  if (at_launch == NULL) return CUDA_SUCCESS;
  if (config->gridDimY != 1 || config->gridDimZ != 1 || config->blockDimY != 1) {
    return CUDA_ERROR_INVALID_VALUE;  // which our kernels have no use for
  }
  return at_launch(config->gridDimX, config->blockDimX, config->sharedMemBytes, f, params);
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *found, CUdevice_attribute attribute, CUdevice device) {
  *found = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32
           : attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *found, CUfunction_attribute attribute, CUfunction f) {
  *found = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static long loaded;
  *module = (CUmodule)++loaded;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid value; the stub takes grids of one dimension"
                                            : "an error of the stub";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13020;
  return CUDA_SUCCESS;
}
// What TMA has to know, in place of the driver's own form of it.
struct tensor_map {
  cuuint64_t address;
  cuuint32_t rank, element;
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], swizzle;
};

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned row_of[] = {256 * 8, 32, 64, 128};
  if (type >= sizeof bytes_of / sizeof *bytes_of) return CUDA_ERROR_INVALID_VALUE;
  struct tensor_map told = {(cuuint64_t)address, rank, bytes_of[type]};
  int fits = (cuuint64_t)address % 16 == 0 && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
             interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B;
  for (unsigned i = 0; i < rank; ++i) {
    told.sizes[i] = sizes[i];
    told.box[i] = box[i];
    fits = fits && sizes[i] >= 1 && sizes[i] <= 1ULL << 32 && steps[i] == 1;
    fits = fits && box[i] >= 1 && box[i] <= 256;
    if (i + 1 == rank) break;
    told.strides[i] = strides[i];
    fits = fits && strides[i] % 16 == 0 && strides[i] < 1ULL << 40;
  }
  told.swizzle = swizzle;
  const unsigned inner = box[0] * told.element;
  fits = fits && inner % 16 == 0 && inner <= row_of[swizzle & 3];
  memset(map, 0, sizeof *map);
  memcpy(map, &told, sizeof told);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int given) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *found) {
  *found = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *found, CUfunction f, const CUlaunchConfig *config) {
  *found = 1;
  return CUDA_SUCCESS;
}
"""


# A launch's programs, their threads and bytes of shared memory, the kernel's handle, and where its
# parameters are; returns a CUresult.
AtLaunch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def _takes_cpu_tensors() -> bool:
    return True


@contextlib.contextmanager
def installed(
    folder: Path, gpu: devices.Device = GPU, at_launch: Callable[..., int] | None = None
) -> Iterator[None]:
    """A context in which Triton launches by such a driver, built in ``folder`` with the kernels.

    ``at_launch`` is called at each launch with the arguments of ``AtLaunch``. The process keeps the
    library: no other driver can be loaded after it.

    Raises:
        RuntimeError: There is no C compiler, or it fails.
    """
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    options = ["-shared", "-fPIC", f"-I{HEADERS}", "-Wl,-soname,libcuda.so.1"]
    compiler = os.environ.get("CC", "cc")
    try:
        subprocess.run(  # nosec B603
            [compiler, *options, str(source), "-o", str(library)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except OSError as error:
        raise RuntimeError(
            f"the stub of a driver needs a C compiler, cc or what CC names: {error}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} cannot compile the stub: {error.stderr.strip()}") from error
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL("libcuda.so.1")  # the process's first one, which Triton finds too
    called = AtLaunch(at_launch) if at_launch else AtLaunch()
    capability = int(gpu.architecture.removeprefix("sm_"))
    with knobs.nvidia.scope(), knobs.cache.scope():
        knobs.nvidia.libcuda_path, knobs.cache.dir = str(folder), str(folder / "cache")
        stub = nvidia.CudaDriver()
        stub.get_current_device = lambda: 0
        stub.get_current_stream = lambda device: 0
        stub.get_device_capability = lambda device=None: divmod(capability, 10)
        with (
            mock.patch.object(driver, "_active", stub),
            mock.patch.object(backend, "interpreted", _takes_cpu_tensors),
            mock.patch.object(backend, "unavailable", list),
            mock.patch.object(devices, "device_of", return_value=gpu),
        ):
            loaded.call_at_launch(called)
            try:
                yield
            finally:
                loaded.call_at_launch(AtLaunch())
