/* A stand-in for NVIDIA's libcuda.so.1 whose device is Python: every call that matters goes to one function that
   tests/cuda/mock/driver.py registers. pycuda is linked against it (build.py) and runs on it; what pycuda needs to be linked but
   never calls here returns CUDA_ERROR_NOT_SUPPORTED. */
#include <stddef.h>
#include <string.h>

typedef unsigned long long u64;
typedef int R;
typedef R (*call_t)(const char *name, u64 *a);
static call_t call;
static int context, streams[16], made; /* the first stream is the one that captures */

static int ended; /* after the device has gone, the driver is "deinitialized", as at the end of a process */
void mock_register(call_t f) { ended = !f; call = f; }
#define GO(name, ...) u64 a[] = {__VA_ARGS__}; return call ? call(name, a) : ended ? 4 : 100
#define P(x) ((u64)(size_t)(x))
#define STREAM(s) (P(s) - 1 < 2 ? 100 + P(s) : (s) ? (u64)((int *)(s) - streams) : 0) /* 101, 102: CUDA's default ones */

R cuInit(unsigned f) { return call ? 0 : 100; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { *n = call ? 1 : 0; return 0; }
R cuDeviceGet(int *d, int i) { *d = i; return i ? 101 : 0; }
R cuDeviceGetName(char *n, int l, int d) { strncpy(n, "mock of libcuda (PTX emulator)", l); return 0; }
R cuDeviceGetAttribute(int *v, int what, int d) { GO("attribute", P(v), what); }
R cuDeviceComputeCapability(int *a_, int *b, int d) { *a_ = 8, *b = 0; return 0; }
R cuDeviceTotalMem_v2(size_t *n, int d) { GO("total", P(n)); }
R cuCtxCreate_v4(void **c, void *p, unsigned f, int d) { *c = &context; return 0; }
R cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
R cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
R cuCtxPopCurrent_v2(void **c) { if (c) *c = &context; return 0; }
R cuCtxPushCurrent_v2(void *c) { return c == &context ? 0 : 201; }
R cuCtxAttach(void **c, unsigned f) { *c = &context; return 0; }
R cuCtxDetach(void *c) { return 0; }
R cuCtxGetDevice(int *d) { *d = 0; return 0; }
R cuCtxSynchronize(void) { GO("synchronize", 0); }
R cuStreamCreate(void **s, unsigned f) { *s = &streams[made++ % 16]; return 0; }
R cuStreamWaitEvent(void *s, void *e, unsigned f) { GO("wait", STREAM(s), P(e)); }
R cuEventCreate(void **e, unsigned f) { GO("event", P(e)); }
R cuEventRecord(void *e, void *s) { GO("record", P(e), STREAM(s)); }
R cuEventDestroy_v2(void *e) { return 0; }
R cuStreamDestroy_v2(void *s) { return 0; }
R cuStreamSynchronize(void *s) { GO("wait_here", STREAM(s)); }
R cuEventSynchronize(void *e) { GO("join", P(e)); }
R cuStreamBeginCapture_v2(void *s, int mode) { GO("begin_capture", STREAM(s) % 16 == 0, mode); }
R cuStreamEndCapture(void *s, void **g) { GO("end_capture", P(g)); }
R cuGraphInstantiateWithFlags(void **e, void *g, u64 f) { GO("instantiate", P(e), P(g)); }
R cuGraphLaunch(void *e, void *s) { GO("graph_launch", P(e)); }
R cuGraphExecDestroy(void *e) { GO("graph_free", P(e)); }
R cuGraphDestroy(void *g) { return 0; }
R cuMemAlloc_v2(u64 *p, size_t n) { GO("allocate", P(p), n); }
R cuMemFree_v2(u64 p) { GO("free", p); }
R cuMemHostAlloc(void **p, size_t n, unsigned f) { GO("allocate_host", P(p), n); }
R cuMemFreeHost(void *p) { GO("free_host", P(p)); }
R cuMemcpyHtoD_v2(u64 d, const void *s, size_t n) { GO("upload", d, P(s), n, 0); }
R cuMemcpyHtoDAsync_v2(u64 d, const void *s, size_t n, void *st) { GO("upload", d, P(s), n, STREAM(st)); }
R cuMemcpyDtoH_v2(void *d, u64 s, size_t n) { GO("download", P(d), s, n, 0); }
R cuMemcpyDtoHAsync_v2(void *d, u64 s, size_t n, void *st) { GO("download", P(d), s, n, STREAM(st)); }
R cuMemcpyDtoD_v2(u64 d, u64 s, size_t n) { GO("copy", d, s, n); }
R cuMemcpyDtoDAsync_v2(u64 d, u64 s, size_t n, void *st) { GO("copy", d, s, n); }
R cuModuleLoadDataEx(void **m, const void *image, unsigned n, void *o, void **v) { GO("load", P(m), P(image)); }
R cuModuleLoadData(void **m, const void *image) { GO("load", P(m), P(image)); }
R cuModuleUnload(void *m) { GO("unload", P(m)); }
R cuModuleGetFunction(void **f, void *m, const char *name) { GO("function", P(f), P(m), P(name)); }
R cuFuncGetAttribute(int *v, int what, void *f) { *v = what == 0 ? 1024 : 0; return 0; }
R cuFuncSetAttribute(void *f, int what, int v) { GO("set_attribute", P(f), what, v); }
R cuFuncSetCacheConfig(void *f, int c) { return 0; }
R cuFuncSetBlockShape(void *f, int x, int y, int z) { return 0; }
R cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *st,
                 void **params, void **extra) {
  void *buffer = 0;
  size_t n = 0;
  for (int i = 0; extra && extra[i]; i += 2) {
    if (extra[i] == (void *)1) buffer = extra[i + 1];
    if (extra[i] == (void *)2) n = *(size_t *)extra[i + 1];
  }
  GO("launch", P(f), gx, gy, gz, bx, by, bz, shared, P(buffer), n, STREAM(st));
}
R cuGetErrorString(int e, const char **s) {
  static const struct { int code; const char *text; } table[] = {
      {1, "invalid argument"}, {2, "out of memory"}, {100, "no CUDA-capable device is detected"}, {201, "invalid device context"},
      {218, "a PTX JIT compilation failed"}, {500, "named symbol not found"}, {700, "an illegal memory access was encountered"},
      {701, "too many resources requested for launch"}, {709, "context is destroyed"}, {716, "misaligned address"},
      {719, "unspecified launch failure"}, {801, "operation not supported"}};
  *s = "unrecognized error code";
  for (unsigned i = 0; i < sizeof table / sizeof *table; ++i)
    if (table[i].code == e) *s = table[i].text;
  return 0;
}

#define NOT(name) R name(void) { return 801; }
NOT(cuArray3DCreate_v2) NOT(cuArray3DGetDescriptor_v2) NOT(cuArrayCreate_v2) NOT(cuArrayDestroy) NOT(cuArrayGetDescriptor_v2)
NOT(cuCtxDisablePeerAccess) NOT(cuCtxEnablePeerAccess) NOT(cuCtxGetApiVersion) NOT(cuCtxGetCacheConfig) NOT(cuCtxGetLimit)
NOT(cuCtxGetSharedMemConfig) NOT(cuCtxSetCacheConfig) NOT(cuCtxSetLimit) NOT(cuCtxSetSharedMemConfig)
NOT(cuDeviceCanAccessPeer) NOT(cuDeviceGetByPCIBusId) NOT(cuDeviceGetPCIBusId)
NOT(cuEventElapsedTime_v2) NOT(cuEventQuery) NOT(cuFuncSetSharedSize)
NOT(cuIpcCloseMemHandle) NOT(cuIpcGetEventHandle) NOT(cuIpcGetMemHandle) NOT(cuIpcOpenEventHandle) NOT(cuIpcOpenMemHandle_v2)
NOT(cuLaunch) NOT(cuLaunchGrid) NOT(cuLaunchGridAsync) NOT(cuLinkAddData_v2) NOT(cuLinkAddFile_v2) NOT(cuLinkComplete)
NOT(cuLinkCreate_v2) NOT(cuLinkDestroy) NOT(cuMemAllocManaged) NOT(cuMemAllocPitch_v2)
NOT(cuMemGetAddressRange_v2) NOT(cuMemGetInfo_v2) NOT(cuMemHostGetDevicePointer_v2) NOT(cuMemHostGetFlags)
NOT(cuMemHostRegister_v2) NOT(cuMemHostUnregister) NOT(cuMemcpy2DAsync_v2) NOT(cuMemcpy2DUnaligned_v2) NOT(cuMemcpy2D_v2)
NOT(cuMemcpy3DAsync_v2) NOT(cuMemcpy3DPeer) NOT(cuMemcpy3DPeerAsync) NOT(cuMemcpy3D_v2) NOT(cuMemcpyAtoA_v2)
NOT(cuMemcpyAtoD_v2) NOT(cuMemcpyAtoH_v2) NOT(cuMemcpyDtoA_v2) NOT(cuMemcpyHtoA_v2) NOT(cuMemcpyPeer) NOT(cuMemcpyPeerAsync)
NOT(cuMemsetD16Async) NOT(cuMemsetD16_v2) NOT(cuMemsetD2D16Async) NOT(cuMemsetD2D16_v2) NOT(cuMemsetD2D32Async)
NOT(cuMemsetD2D32_v2) NOT(cuMemsetD2D8Async) NOT(cuMemsetD2D8_v2) NOT(cuMemsetD32Async) NOT(cuMemsetD32_v2)
NOT(cuMemsetD8Async) NOT(cuMemsetD8_v2) NOT(cuModuleGetGlobal_v2) NOT(cuModuleGetSurfRef) NOT(cuModuleGetTexRef)
NOT(cuModuleLoad) NOT(cuParamSetSize) NOT(cuParamSetTexRef) NOT(cuParamSetf) NOT(cuParamSeti) NOT(cuParamSetv)
NOT(cuProfilerInitialize) NOT(cuProfilerStart) NOT(cuProfilerStop) NOT(cuStreamAttachMemAsync) NOT(cuStreamQuery)
NOT(cuSurfRefGetArray) NOT(cuSurfRefSetArray) NOT(cuTexRefCreate) NOT(cuTexRefDestroy)
NOT(cuTexRefGetAddressMode) NOT(cuTexRefGetAddress_v2) NOT(cuTexRefGetArray) NOT(cuTexRefGetFilterMode) NOT(cuTexRefGetFlags)
NOT(cuTexRefGetFormat) NOT(cuTexRefSetAddress2D_v3) NOT(cuTexRefSetAddressMode) NOT(cuTexRefSetAddress_v2)
NOT(cuTexRefSetArray) NOT(cuTexRefSetFilterMode) NOT(cuTexRefSetFlags) NOT(cuTexRefSetFormat)
