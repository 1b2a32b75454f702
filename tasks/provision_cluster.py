"""Task: configuration and data -> a plan of the cluster, checked against what is there."""

from flytekit import Cache, task

from tasks.outputs import PreparedData, ProvisionedCluster
from tasks.resources import CPU_IMAGE, HUB_TOKEN, POD_TEMPLATE, RETRIES, SHORT, TINY, cluster_nodes
from tasks.run_input import RunInput
from tasks.stage import stage, tell

CACHE_VERSION = "1"
"""Raise it when the plan of the same inputs changes."""


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    secret_requests=[HUB_TOKEN],
    cache=Cache(version=CACHE_VERSION, serialize=True),
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def provision_cluster(run: RunInput, data: PreparedData) -> ProvisionedCluster:
    """Plan who sits where, how much memory the store gets and what it will cost.

    Refuses what can't work. A rerun with the same settings and data takes the same plan.
    """
    with stage("provision_cluster") as watch:
        from tasks import reports
        from torchspec_lib import cost, pipeline
        from torchspec_lib.registry import registry
        from torchspec_lib.registry.model_card import estimate_text

        plan = pipeline.provision(run, data.manifest, cluster_nodes())
        registry.champion(run, data.target)  # raises where it belongs to another target
        estimate = cost.estimate(run, plan, data.manifest)
        tell(f"about {estimate_text(estimate)} ({estimate.basis})")
        folder = data.run_folder(run)
        if reports.is_missing("data", folder):
            reports.publish_data(run, data.target, data.manifest, data.shared_folder(run))
        reports.publish("plan", reports.plan_report(plan, estimate), folder)
        return ProvisionedCluster(plan=plan, estimate=estimate, wall_s=watch.elapsed_s)
