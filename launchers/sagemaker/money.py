"""What a job costs, said before it is sent."""

from __future__ import annotations

from job import Job

from esm_neuron.planning.instances import read_prices


def lines(job: Job) -> list[str]:
    """Return the cost of a job that runs until `max_run`."""
    prices, price = read_prices(job.prices), job.instance.prices.get("sagemaker")
    if price is None or job.most_dollars is None:
        return [f"cost: the price of {job.instance_type} is not known; give it by --prices FILE"]
    share = f", spot about {job.most_dollars * prices.assumptions.spot_share:,.2f}" if job.spot else ""
    return [
        f"cost: at most {job.most_dollars:,.2f} dollars on demand{share}: {job.instance_count} x {job.instance_type} x "
        f"{job.max_run / 3600:g} h (--max-run) x {price} an hour; prices of {prices.date}, {prices.region}"
    ]
