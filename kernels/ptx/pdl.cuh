// Programmatic dependent launch. Every kernel calls `launch_dependents` first thing and `wait` on every path before it reads
// what another kernel writes, before it writes, and before it exits. Below sm_90 both are nothing: launches are in order.
#pragma once

namespace pdl {

// The next kernel may be scheduled once every CTA of this one has said so (or has exited).
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernels before this one have completed and their writes are visible.
__device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pdl
