"""The report of an execution that failed."""

from collections.abc import Sequence

from tasks.report_page import clipped, decision, facts, highlighted, page, section

RELAUNCH = (
    "Change what the error names, then relaunch with the same inputs: stages that are finished are "
    "found by their content, and a training goes on from its last checkpoint. Nodes, engines and "
    "the store are gone already"
)


def failure_report(
    failed_node: str, message: str, unfinished: Sequence[str], removed: Sequence[str]
) -> str:
    """Where an execution failed, why, and what a relaunch finds.

    Args:
        failed_node: Flyte's name of the node.
        message: The error's, with its traceback if it has one; its last line says most.
        unfinished: One sentence for every run that a relaunch goes on with.
        removed: Folders that were half-made.
    """
    told = message.strip().splitlines() or ["no reason is known"]
    trace = [section("In full", highlighted((f"{line}\n", False) for line in told))]
    return page(
        "Failed",
        f"at node {failed_node}",
        decision(False, clipped(told[-1])),
        facts(
            {
                "what to do": RELAUNCH,
                "unfinished": "; ".join(unfinished) or "no run that has a checkpoint",
                "removed, half-made": "; ".join(removed) or "nothing",
            }
        ),
        *(trace if len(told) > 1 else []),
    )
