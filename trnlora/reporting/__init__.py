"""What a run left behind, and how it is shown: report, summary, model card."""
