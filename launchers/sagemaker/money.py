"""What a job costs, said before it is sent: at most, and by an estimate; and the cheapest instance that fits."""

from __future__ import annotations

from job import Job

from esm_neuron.planning import cost
from esm_neuron.planning.instances import read_prices

STEPS = 1000
"""Steps that are estimated where the run's own number follows from its data, which is not read here."""


def lines(job: Job) -> list[str]:
    """Return what the job costs until `max_run`, what its steps are estimated to cost, and where that is least."""
    return [most(job), *estimated(job)]


def most(job: Job) -> str:
    """Return the cost of a job that runs until `max_run`."""
    prices, price = read_prices(job.prices), job.instance.prices.get("sagemaker")
    if price is None or job.most_dollars is None:
        return f"cost: the price of {job.instance_type} is not known; give it by --prices FILE"
    share = f", spot about {job.most_dollars * prices.assumptions.spot_share:,.2f}" if job.spot else ""
    hours = f"{(job.max_run + job.keep_alive) / 3600:g} h (--max-run{' and --keep-alive' if job.keep_alive else ''})"
    return (
        f"cost: at most {job.most_dollars:,.2f} dollars on demand{share}: {job.instance_count} x {job.instance_type} x "
        f"{hours} x {price} an hour; prices of {prices.date}, {prices.region}"
    )


def estimated(job: Job) -> list[str]:
    """Return the estimate of some steps on the job's instances, and of the instance on which they are cheapest."""
    cfg, prices = job.run, read_prices(job.prices)
    shape = job.shape
    if shape is None or job.compile_only:
        return []
    work = cost.Work.of_steps(cfg, cfg.loop.max_steps or STEPS)
    mine, others = (cost.estimates(cfg, work, shape, prices, n, "sagemaker") for n in (job.instance_count, 1))
    plain = job.instance_type.removeprefix("ml.")
    here = next((e for e in mine if e.instance == plain and e.tp == cfg.parallel.tp), None)
    if here is None or here.refused is not None:
        return [] if here is None else [f"estimate: it may not fit: {here.refused}"]
    if here.dollars is None:
        return []
    cheapest = min((e for e in others if e.dollars is not None), key=lambda e: e.dollars or 0.0, default=here)
    said = [f"estimate, by the roofline of `esm-neuron plan`: {work.steps:,} steps of full packs, {_cost(here)}"]
    said[0] += f"; besides, about {prices.assumptions.start_minutes:g} min to start"
    if (cheapest.dollars or 0.0) < here.dollars and cheapest.instance != here.instance:
        said.append(f"cheapest that fits: ml.{cheapest.instance}, {_cost(cheapest)}")
    return said


def _cost(e: cost.Estimate) -> str:
    compiling = f" and {e.compile_hours:.2f} h of compiling, at most and without a cache" if e.compile_hours else ""
    return f"{e.dollars:,.2f} dollars for {e.hours:.2f} h{compiling}"
