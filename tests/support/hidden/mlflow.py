"""On the path of processes that import DeepSpeed: its tuner imports MLflow, if it is there, which takes two seconds."""

raise ModuleNotFoundError("MLflow is hidden from DeepSpeed's tuner in the tests", name="mlflow")
