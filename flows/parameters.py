"""What each parameter of a flow is: one sentence for `wan --help` and for the form in Prefect's UI alike."""

from __future__ import annotations

NEWEST = "Default: the newest of this name in the workspace."
PARAMETERS = {
    "config": "What is computed; what is left out takes its default.",
    "ray": "Where encoders run.",
    "launch": "Where training runs.",
    "name": "Name of the outputs in the workspace.",
    "videos": "Folder of clips and their captions, or the URL of one (s3://bucket/clips).",
    "model": "WAN 2.1 model folder in the Diffusers layout.",
    "workspace": "Folder that gets all outputs, in one folder per stage.",
    "encoded": f"Output folder of encode. {NEWEST}",
    "sharded": f"Output folder of shard. {NEWEST}",
    "dataset": f"Output folder of index. {NEWEST}",
    "trained": f"Run folder of train. {NEWEST}",
    "sampled": f"Output folder of sample. {NEWEST}",
    "refresh": "Run this stage and all that depends on it again.",
}
STAGE_PARAMETERS = {**PARAMETERS, "refresh": "Run it again even if its output is there."}
SAMPLE_PARAMETERS = {**STAGE_PARAMETERS, "model": f"Any WAN model folder in the Diffusers layout. {NEWEST}"}
