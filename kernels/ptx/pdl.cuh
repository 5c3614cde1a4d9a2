// Programmatic dependent launch: a kernel may start while its predecessor still runs. kernels/README.md has the rules.
// Below sm_90 both functions are empty, and kernels run one after another.
#pragma once

namespace pdl {

// Allows the next kernel to start. It may start once every CTA of this kernel has called this or has exited.
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
