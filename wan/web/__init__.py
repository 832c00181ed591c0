"""The page: a queue of jobs over wan.run, its JSON interface, and a form with live views in the browser.

__main__        the command
service         what the parts share: folder, queue, planner, gallery
queue           the jobs, and the worker process that runs them
jobs            a job and its file; settings to requests
job_files       the files of all jobs, also while the disk is full
run_progress    how far the running job is
child           a child process that speaks in lines of JSON
worker          the program of such a child: runs requests, or plans them
memory_samples  samples of a run's memory; chart draws them
views           jobs, memory and results as HTML
gallery         finished results, known from their files alone
guard           who may ask, what may be sent, and what the browser may load
api             JSON over HTTP
gate            the values that the page's events may carry
page            the page; form and plan_html are its parts
"""
