"""Settings that hold for every test."""

import logging
import os

# Tests run side by side, one for each core: threads of their own would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torchao tries its own CUDA libraries at import and reports each one that does not fit this torch.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
