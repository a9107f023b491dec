"""Speed, memory and agreement of a UNet's variants, measured one after the other in one run: ``mixdq-ao bench``."""

from mixdq_ao.bench.plot import check_plot, write_plot
from mixdq_ao.bench.results import Results, Row, table
from mixdq_ao.bench.run import run_bench, run_step

__all__ = ["Results", "Row", "check_plot", "run_bench", "run_step", "table", "write_plot"]
