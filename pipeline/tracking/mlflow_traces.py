"""Stores rollouts as MLflow traces: one span each, reward and success as assessments, tags to filter by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from configs.redaction import without_secrets
from pipeline.tracking.mlflow_store import MlflowRun, valid_key
from pipeline.tracking.traces import RolloutTrace

_PREVIEW, _LONGEST_TAG = 1000, 5000
_SCORED_BY = "verifier"


def store_traces(run: MlflowRun, traces: Sequence[RolloutTrace]) -> None:
    """Store ``traces`` with an MLflow run. Their ids follow from the run's and their keys, so that a call that is
    tried again stores nothing twice. Called in the outbox's thread."""
    from mlflow.entities import Span
    from mlflow.tracing.client import TracingClient

    if not run.id:
        return
    client, spans = TracingClient(run.store.uri), []
    run_id, experiment_id = run.id, run.store.experiment_id
    for trace in traces:
        number = hashlib.sha256(f"{run_id}/{trace.key}".encode()).hexdigest()[:32]
        client.start_trace(_info(f"tr-{number}", experiment_id, run_id, trace))
        spans.append(Span.from_dict(_span(f"tr-{number}", number[:16], trace)))
    client.log_spans(experiment_id, spans)


def _info(trace_id: str, experiment_id: str, run_id: str, trace: RolloutTrace) -> Any:
    from mlflow.entities import AssessmentSource, Feedback, TraceInfo, TraceLocation, TraceState

    scores = {"reward": trace.reward, "success": trace.success}
    source = AssessmentSource(source_type="CODE", source_id=_SCORED_BY)
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=_microseconds(trace) // 1000,
        state=TraceState.OK,
        request_preview=without_secrets(trace.prompt)[:_PREVIEW],
        response_preview=without_secrets(str(trace.outputs["response"]))[:_PREVIEW],
        execution_duration=0,
        trace_metadata={"mlflow.sourceRun": run_id},
        tags={"mlflow.traceName": trace.name}
        | {valid_key(name): without_secrets(text)[:_LONGEST_TAG] for name, text in trace.tags.items()},
        assessments=[
            Feedback(name=name, value=value, trace_id=trace_id, source=source)
            for name, value in scores.items()
            if value is not None
        ],
    )


def _microseconds(trace: RolloutTrace) -> int:
    return round(1e6 * trace.created)  # as fine as the replay buffer has it, and a float holds


def _span(trace_id: str, span_id: str, trace: RolloutTrace) -> dict[str, Any]:
    """In the form of MLflow's own ``Span.to_dict``, whose attributes are JSON texts."""
    when = 1000 * _microseconds(trace)
    attributes = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "LLM",
        "mlflow.spanInputs": {"prompt": trace.prompt},
        "mlflow.spanOutputs": {name: value for name, value in trace.outputs.items() if value is not None},
    }
    return {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_span_id": None,
        "name": trace.name,
        "start_time_unix_nano": when,
        "end_time_unix_nano": when,
        "status": {"code": "OK", "message": ""},
        "events": [],
        "attributes": {name: without_secrets(json.dumps(value)) for name, value in attributes.items()},
    }
