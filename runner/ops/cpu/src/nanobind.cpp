// nanobind's own code, which comes as source: included rather than listed in setup.py, where a path outside the tree is
// refused when an sdist is built.
#include <nb_combined.cpp>
