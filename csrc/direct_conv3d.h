#pragma once

#include <cstdint>

namespace meddiff {

// Rows of outputs of a convolution in bfloat16, as products of matrices. A unit is `group` voxels one behind the other
// along W: their inputs, with those that the taps along W reach beside them, are a run of memory, and a row of the
// first matrix; the columns of the second one are the unit's outputs, voxel by voxel. Few channels fill a matrix in
// this way. Runs are read in blocks of 32 numbers; the weight is zero behind the last that counts.
struct DirectConvRows {
  const uint16_t* inputs[9];  // of the first unit, for each of the taps along D and H
  int64_t taps, step, blocks;  // numbers from unit to unit, and blocks of a run
  const uint16_t* shortcut;  // of the first unit, a run of its own voxels for a convolution 1³; or null
  int64_t shortcut_step, shortcut_blocks;
  // for each two tiles of 16 columns, or the last one: [taps·blocks + shortcut_blocks][tiles][16][16][2], the last axis
  // being two numbers of a run one behind the other
  const uint16_t* weight;
  const float* bias;  // [columns]
  int64_t columns;  // a multiple of 16
  int64_t height, width, units;  // rows and voxels of outputs, and units from row to row
  int64_t group, outputs;  // outputs of a voxel: channels
  const uint16_t* residual;  // added to the outputs, or null
  int64_t residual_row;  // numbers from row to row
  uint16_t* out;
  int64_t out_row, out_voxel;
  // of each column, if they are there: a number near its outputs, written, and Σ and Σ² of the difference from that,
  // added to what is there
  float* pivot;
  double *sum, *sum_of_squares;
};

struct DirectConvIsa {
  const char* name;
  void (*begin)();  // in each thread, before and behind its calls of `convolve`
  void (*end)();
  void (*convolve)(const DirectConvRows& rows);  // reads up to 63 units behind the last one
  // 16 columns of a block, zeros where there are none: from [columns, ·] of stride `column`, `count` ≤ 32 numbers each
  void (*arrange)(const uint16_t* from, int64_t column, int64_t columns, int64_t count, uint16_t* tile);
};

extern const DirectConvIsa kDirectConvPortable;
extern const DirectConvIsa kDirectConvAmx;

}  // namespace meddiff
