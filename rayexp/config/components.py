"""Parts by name: where a workload of that name is found, as `module:Class`. Names only; nothing is imported here."""

from __future__ import annotations

WORKLOADS = {
    "image_classification": "rayexp.workloads.image_classification.workload:ImageClassification",
    "language_model": "rayexp.workloads.language_model.workload:LanguageModel",
}
