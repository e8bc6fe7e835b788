"""How the threads of one operation wait for each other on a CPU; to be imported before torch.

By default they spin, which is quickest while each has a core to itself. With other work on the cores one thread waits
for another that is not running, and takes from it the time that it spins: on two cores shared with a training run,
small layers ran 1.2 to 2.7 times a second, at 6 to 10 a second of processor time. Threads that sleep while they wait
ran them 10 to 35 times, at 51 to 61, as one thread does; fewer turns of the loop, GOMP_SPINCOUNT=1000, 9 to 17 times.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, as torch loads OpenMP
