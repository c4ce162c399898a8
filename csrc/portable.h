// What lets a function be compiled for the host by any compiler and for the device by nvcc: tests on the CPU then run the very
// arithmetic that a GPU runs.
#pragma once

#ifdef __CUDACC__
#define FASTD2O_HD __host__ __device__ __forceinline__
#else
#define FASTD2O_HD inline
#endif
