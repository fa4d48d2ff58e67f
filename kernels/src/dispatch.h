// Which instruction set runs: the best one that the machine has, until another is chosen.
#pragma once

#include "tile.h"

namespace bdk {

int instruction_set_count();
const InstructionSet* instruction_set(int index);  // best first; null past the end
bool instruction_set_available(int index);
int chosen_instruction_set();
bool choose_instruction_set(int index);

}  // namespace bdk
