"""Plans of small clusters, for a Ray on this machine."""

from torchspec_lib.plan import Bundle, ClusterPlan


def make_plan(placement="separate", num_trainers=1, num_engines=1, gpus=0, engine_gpus=0):
    trainer = Bundle(roles=("training",), num_cpus=1, num_gpus=gpus)
    engine = Bundle(roles=("inference",), num_cpus=1, num_gpus=engine_gpus or gpus)
    if placement == "colocate":
        trainer = Bundle(roles=("training", "inference"), num_cpus=2, num_gpus=gpus)
    has_trainers, has_engines = (
        placement != "debug_inference_only",
        placement
        in (
            "separate",
            "debug_inference_only",
        ),
    )
    return ClusterPlan(
        device="cpu",
        placement=placement,
        training_bundles=(trainer,) * num_trainers if has_trainers else (),
        inference_bundles=(engine,) * num_engines if has_engines else (),
        training_num_nodes=1,
        inference_num_nodes=1,
        num_engines=num_engines,
        num_steps=1,
        bytes_per_token=1,
        sample_bytes=1,
        max_in_flight_bytes=1,
        segment_bytes=1,
        weight_bytes=1,
    )
