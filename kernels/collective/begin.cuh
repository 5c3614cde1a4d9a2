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

// Counts the step's collectives into `done` (which those of the step begin from) and the step into `steps`. Tells the stage before, if
// there is one, how many steps' rows this rank has taken: all that were begun before this one.
__global__ void __launch_bounds__(32) begin(u32* done, i32 collectives, u32* steps, u32* taken) {
    pdl::launch_dependents();
    pdl::wait();
    if (threadIdx.x != 0) return;
    *done += collectives;
    const u32 before = *steps;
    *steps = before + 1;
    if (taken != nullptr) put(taken, before);
}

}  // namespace exchange
