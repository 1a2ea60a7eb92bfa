// Leave to use the tile registers of AMX, which Linux gives to a process that asks for it.
#pragma once

namespace runner {

// Null where they can be used, from then on in every thread; else why not. Asks once.
const char* why_no_tiles();

}  // namespace runner
