// The order of a linear's tiles. Tiles are numbered, and a CTA takes every gridDim.x-th. Rows are output features,
// columns are tokens.
#pragma once

#include "base/types.cuh"

namespace sched {

struct Tile {
    int expert;  // 0 for a dense linear
    int row;     // index of the tile of rows
    int first;   // first column: a token, or a position in the order by expert
    int count;   // columns
};

// Tile `index` of rows × columns. Tiles are numbered in bands of about 2048 columns, and in a band row by row. So the
// tiles that are computed at the same time form a square, and a band's tokens (17 MB with 4096 16-bit elements each)
// stay in L2 while weights stream past them. Every band reads all weights again. So a few extra tiles make the bands
// wider instead of adding a band.
template <int COLS>
__device__ __forceinline__ void locate(int index, int row_tiles, int col_tiles, int& row, int& col) {
    constexpr int BAND = 2048 / COLS;
    const int bands = max((col_tiles + BAND / 2) / BAND, 1);
    const int most = (col_tiles + bands - 1) / bands;
    const int band = index / (most * row_tiles);
    const int width = min(most, col_tiles - band * most);
    const int within = index - band * most * row_tiles;
    row = within / width;
    col = band * most + within % width;
}

// All rows of one weight with all tokens.
template <int ROW_TILES, int COLS>
struct Dense {
    int columns;

    __device__ __forceinline__ bool at(int index, Tile& tile) const {
        const int col_tiles = (columns + COLS - 1) / COLS;
        if (index >= ROW_TILES * col_tiles) return false;
        int col;
        locate<COLS>(index, ROW_TILES, col_tiles, tile.row, col);
        tile.expert = 0;
        tile.first = col * COLS;
        tile.count = min(COLS, columns - tile.first);
        return true;
    }
};

// Each expert's rows with its tokens. `offsets[e]` is the position of expert e's first token in expert order. With
// `EVERY`, an expert that has any token gets all tokens of the step (at most COLS). Then no tokens have to be gathered,
// and the epilogue drops those that are not the expert's.
template <int EXPERTS, int ROW_TILES, int COLS, bool EVERY>
struct ByExpert {
    const int* offsets;
    int tokens;
    int expert = 0;  // where the search stands
    int before = 0;  // tiles of the experts before it

    // Successive calls have ascending indices.
    __device__ __forceinline__ bool at(int index, Tile& tile) {
        for (; expert < EXPERTS; expert++) {
            const int first = offsets[expert], count = offsets[expert + 1] - first;
            const int col_tiles = EVERY ? (count > 0) : (count + COLS - 1) / COLS;
            if (index < before + ROW_TILES * col_tiles) {
                int col;
                locate<COLS>(index - before, ROW_TILES, col_tiles, tile.row, col);
                tile.expert = expert;
                tile.first = EVERY ? 0 : first + col * COLS;
                tile.count = EVERY ? tokens : min(COLS, count - col * COLS);
                return true;
            }
            before += ROW_TILES * col_tiles;
        }
        return false;
    }
};

}  // namespace sched
