"""Running verbs on this machine or on a Slurm cluster: `python -m launch VERB CONFIG [key=value ...] --on slurm`.

    site          what differs between clusters
    preflight     what would fail is refused before the queue; `forecast` estimates memory and time
    submit        submit a verb as a job, or its shares as a job array; `chain` plans several verbs
    status        states and logs of jobs, and cancelling them
    supervise     what each rank of a job runs: environment, signals, the verb as a child
    job_end       after all ranks: why the start ended, and whether the job is requeued
    job_files     what a queued job will read: the snapshot of the code, its secrets, its pickle
    slurm         questions to Slurm and its answers as values
    sweep         many trainings of one study; `executors` run its trials

Stands above `hpc_neuro`, which never imports it.
"""
