"""The table of workloads. A further one is one file here, one line in the table, and one YAML in configs/."""

from __future__ import annotations

TABLE = {
    "image_classification": "rayexp.workloads.image_classification:ImageClassification",
    "language_model": "rayexp.workloads.language_model:LanguageModel",
}
