// Op: none; the first launch of every step of a rank that is not alone.
// Regime: any step.
// Tile: a thread.
// Grid: one CTA.
// Numerics: none.
// Requires: nothing.
// Traffic: a few words.
// Measured: not tuned.
#pragma once

#include "collective/exchange.cuh"
#include "ptx/pdl.cuh"

namespace exchange {

// Adds the step's collectives to `done`, modulo the slots, and the step to `steps`. The step's collectives are numbered
// from the new `done` on. If there is a stage before this one, tells it through `taken` how many steps' rows this rank
// has read: those of all steps before this one.
__global__ void __launch_bounds__(32) begin(u32* done, i32 collectives, u32* steps, u32* taken) {
    pdl::launch_dependents();
    pdl::wait();
    if (threadIdx.x != 0) return;
    // Only the slot is needed. A count would wrap around within days, and the slots would then skip one.
    *done = (*done + collectives) % SLOTS;
    const u32 before = *steps;
    *steps = before + 1;
    if (taken != nullptr) put(taken, before);
}

}  // namespace exchange
