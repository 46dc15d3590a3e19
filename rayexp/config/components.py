"""Components by name: the `module:Class` of each workload. Nothing is imported here."""

from __future__ import annotations

WORKLOADS = {
    "image_classification": "rayexp.workloads.image_classification.workload:ImageClassification",
    "language_model": "rayexp.workloads.language_model.workload:LanguageModel",
}
