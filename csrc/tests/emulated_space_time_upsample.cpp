// space_time_upsample.cu, compiled for the host and run thread after thread: they wait for nobody.
#include "../space_time_upsample.cu"
