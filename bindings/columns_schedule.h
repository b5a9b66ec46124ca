// Runs a call of column_attention: cuts it into blocks of queries and shares those out among threads.
#pragma once

#include "columns.h"
#include "schedule.h"

namespace vstar {

// Computes `out` and the maps. Sets what the caller leaves open of the arguments: how the work is
// cut.
void run_columns_forward(ColumnArgs& args, const Threads& threads);

// Computes the gradients. Sets what the caller leaves open, as above.
void run_columns_backward(ColumnBackwardArgs& args, const Threads& threads);

}  // namespace vstar
