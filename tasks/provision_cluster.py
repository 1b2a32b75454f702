"""Task: configuration and data -> a plan of the cluster, checked against what is there."""

from flytekit import task

from tasks.outputs import PreparedData, ProvisionedCluster
from tasks.resources import CPU_IMAGE, TINY, cluster_nodes
from tasks.run_input import RunInput
from tasks.stage import stage


@task(container_image=CPU_IMAGE, requests=TINY, enable_deck=True, deck_fields=())
def provision_cluster(run: RunInput, data: PreparedData) -> ProvisionedCluster:
    """Plan who sits where and how much memory the store gets; refuse what can't work."""
    with stage("provision_cluster") as watch:
        from tasks import reports
        from torchspec_lib import pipeline
        from torchspec_lib.registry import registry

        plan = pipeline.provision(run, data.manifest, cluster_nodes())
        registry.champion(run, data.target)  # raises where it belongs to another target
        reports.publish("plan", reports.plan_report(plan), data.run_folder(run))
        return ProvisionedCluster(plan=plan, wall_s=watch.elapsed_s)
