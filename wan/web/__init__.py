"""The page: a queue of jobs over wan.run, its JSON interface, and what people look at meanwhile.

__main__  the command
service   what the parts share: folder, queue, planner, gallery
queue     the jobs, and the one that runs
jobs      a job and its file; settings to requests
ledger    those files, also while the disk is full
progress  how far the running job is
child     a process of its own, spoken to in lines of JSON
worker    the program in it: runs requests, or plans them
memory    what a run takes: samples and their chart
views     what the page shows of all that, as HTML
gallery   finished results, known from their files alone
guard     who may ask, what may be sent, and what the browser may load
api       JSON over HTTP
gate      what the page's events may carry
page      the form
"""
