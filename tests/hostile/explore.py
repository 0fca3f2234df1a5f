import sys, time, tempfile, collections, traceback, faulthandler
from pathlib import Path
faulthandler.enable()
from hypothesis import given, settings, HealthCheck, Phase, seed
from tests.hostile.given import make_given
from tests.hostile.harness import Sandbox, stopped_before_the_work, STOPPED
from tests.hostile import words
import torch
torch.set_num_threads(1)
count=int(sys.argv[1]); sd=int(sys.argv[2]); kind=sys.argv[3]
top=Path(tempfile.mkdtemp())
t=time.time()
g=make_given(top/"given")
print("given", time.time()-t)
box=Sandbox(top/"box", g)
stat=collections.Counter(); bad=[]; slow=[]
def go(*w):
    t=time.time()
    o=box.attempt(*w)
    dt=time.time()-t
    slow.append((dt,str(o)[:300]))
    stat[o.status]+=1
    if STOPPED in o.err: stat["reached"]+=1
    if o.problems: bad.append(o); print("BAD", str(o)[:1500], flush=True)
    box.clear()
st_=settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
if kind=="lines":
    @seed(sd)
    @st_
    @given(words.command_lines())
    def run(w): go(*w)
else:
    @seed(sd)
    @st_
    @given(words.documents(), words.overrides())
    def run(doc, ov):
        (box.work/"c.yaml").write_bytes(doc.replace(b"@given", str(g).encode()))
        go("train","--config","@work/c.yaml","--workdir","@work/w","--",*[o for o in ov if "=" in o][:20])
with stopped_before_the_work():
    t=time.time(); run()
print(stat, "bad", len(bad), "secs", time.time()-t)
for d,o in sorted(slow)[-5:]: print(round(d,2), o)
