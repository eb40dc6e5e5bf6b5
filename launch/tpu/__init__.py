"""Training on Cloud TPU: queued resources, and JobSets on Google Kubernetes Engine."""
