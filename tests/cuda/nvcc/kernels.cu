// Five small kernels whose PTX, made by nvcc 13.0 with `nvcc -arch=compute_80 -ptx -lineinfo -o kernels.ptx kernels.cu`, lies beside.
// The PTX interpreter runs it in tests/cuda/test_ptx_nvcc.py.
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

extern "C" __global__ void saxpy(int n, float a, const float *__restrict__ x, float *y) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = a * x[i] + y[i];
}

extern "C" __global__ void sgemm(const float *A, const float *B, float *C, int M, int N, int K) {
  __shared__ float a[16][17], b[16][16];
  int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < K; k += 16) {
    a[threadIdx.y][threadIdx.x] = row < M && k + threadIdx.x < K ? A[row * K + k + threadIdx.x] : 0;
    b[threadIdx.y][threadIdx.x] = k + threadIdx.y < K && col < N ? B[(k + threadIdx.y) * N + col] : 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += a[threadIdx.y][i] * b[i][threadIdx.x];
    __syncthreads();
  }
  if (row < M && col < N) C[row * N + col] = sum;
}

__device__ float block_reduce(float v, float *shared, bool maximum) {
  for (int o = 16; o; o >>= 1) {
    float u = __shfl_xor_sync(~0u, v, o);
    v = maximum ? fmaxf(v, u) : v + u;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int i = 1; i < blockDim.x / 32; ++i) v = maximum ? fmaxf(v, shared[i]) : v + shared[i];
  return v;
}

extern "C" __global__ void softmax(const float *x, float *y, int n) {
  extern __shared__ float shared[];
  const float *row = x + (size_t)blockIdx.x * n;
  float m = -INFINITY, s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) m = fmaxf(m, row[i]);
  m = block_reduce(m, shared, true);
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += expf(row[i] - m);
  s = block_reduce(s, shared, false);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[(size_t)blockIdx.x * n + i] = expf(row[i] - m) / s;
}

extern "C" __global__ void histogram(const unsigned char *x, int n, unsigned *h, int *positions) {
  __shared__ unsigned s[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&s[x[i]], 1u);
    if (x[i] == 255) positions[atomicAdd(&h[256], 1u)] = i;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    if (s[i]) atomicAdd(&h[i], s[i]);
}

// One warp per 16x8 tile of C = A B^T in bf16, two stages of cp.async: M a multiple of 16, N of 8, K of 32.
extern "C" __global__ void gemm_bf16(const __nv_bfloat16 *A, const __nv_bfloat16 *Bt, float *C, unsigned M, unsigned N, unsigned K) {
  __shared__ __align__(16) __nv_bfloat16 a[2][16][40], b[2][8][40];
  unsigned lane = threadIdx.x, row0 = blockIdx.y * 16, col0 = blockIdx.x * 8;
  unsigned r = lane / 4, q = lane % 4;
  auto stage = [&](unsigned k, unsigned s) {
    __pipeline_memcpy_async(&a[s][r][q * 8], A + (row0 + r) * K + k + q * 8, 16);
    __pipeline_memcpy_async(&a[s][r + 8][q * 8], A + (row0 + r + 8) * K + k + q * 8, 16);
    __pipeline_memcpy_async(&b[s][r][q * 8], Bt + (col0 + r) * K + k + q * 8, 16);
    __pipeline_commit();
  };
  float c[4] = {0, 0, 0, 0};
  stage(0, 0);
  for (unsigned k = 0, s = 0; k < K; k += 32, s ^= 1) {
    if (k + 32 < K) stage(k + 32, s ^ 1), __pipeline_wait_prior(1);
    else __pipeline_wait_prior(0);
    __syncwarp();
    for (unsigned i = 0; i < 32; i += 16) {
      unsigned x[4], y[2];
      unsigned pa = __cvta_generic_to_shared(&a[s][lane % 16][i + lane / 16 * 8]);
      unsigned pb = __cvta_generic_to_shared(&b[s][lane % 8][i + lane / 8 % 2 * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(pa));
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(pb));
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    }
    __syncwarp();
  }
  for (unsigned i = 0; i < 4; ++i) C[(row0 + r + i / 2 * 8) * N + col0 + q * 2 + i % 2] = c[i];
}
