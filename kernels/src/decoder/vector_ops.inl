// All of VectorOps, in the lanes of whoever includes it.
#include "append.inl"
#include "attend.inl"
#include "dense.inl"
#include "elementwise.inl"
