"""The layer over a mesh, in every combination of parallelism, exchange and number format, against a float32 reference."""

from moe_jax.layer_test.config import MoETestConfig as MoETestConfig
from moe_jax.layer_test.run import LayerTestResult as LayerTestResult
from moe_jax.layer_test.run import run_one_config as run_one_config
from moe_jax.layer_test.support import is_valid_config as is_valid_config
from moe_jax.layer_test.sweep import sweep as sweep
