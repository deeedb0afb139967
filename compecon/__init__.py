"""Make a transformer smaller, to a budget that you name.

Names are loaded when they are first used, so that `import compecon` takes no time. It also teaches transformers to load
settled models, as soon as transformers is there.
"""
__version__ = "0.1.0"

import importlib
import importlib.util
import os
import sys
from types import ModuleType

# Waiting threads sleep, if torch is not loaded yet: some 5 % slower alone, but six times as fast beside another process
if 'torch' not in sys.modules: os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

_MODULES = {
    'budget': 'LatencyTable measure_latency',
    'callback': 'Distill EconomyCallback HFCallback hf_collate',
    'checkpoint': 'CompeconConfig save_family',
    'core': 'Budget mean_tokens',
    'economy': 'Economy layer_table',
    'engines': 'bench',
    'export': 'export load_exported',
    'flops': 'count_flops latency',
    'gates': 'remove_gates',
    'importance': 'score_agents sort_neurons',
    'market': 'AugmentedLagrangian ClearedMarket DualAscent MeasuredMarket PostedPrice AnyBudget',
    'methods': 'apply_method',
    'packed': 'pack pack_economy',
    'prune_in_training': 'PruneInTraining',
    'repair': 'repair',
    'router': 'ContextualEconomy ContextualMarket',
    'settle': 'SettledConfig save settle',
    'shrink': 'shrink',
    'trainer': 'EconomyMixin EconomyTrainer',
    'training': 'PricedTraining',
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name):
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'.{_WHERE[name]}', __name__), name)
    globals()[name] = value  # found at once the next time
    return value


class _Package(ModuleType):
    "`compecon.settle` is the function, also after the module of this name was imported"
    def __setattr__(self, name, value):
        if name in _WHERE and isinstance(value, ModuleType): return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__(): return sorted({*globals(), *__all__})


class _Lazy:
    "Stands in a registry of transformers for a class of compecon.settle, which takes its place when it is imported"
    def __init__(self, name): self.name = name
    def __call__(self, *args, **kwargs): return self._real(*args, **kwargs)
    def __getattr__(self, key): return getattr(self._real, key)
    @property
    def _real(self): return getattr(importlib.import_module('.settle', __name__), self.name)


class _Registration:
    "Waits for transformers' registry of quantizers, and adds settled models to it"
    registry = 'transformers.quantizers.auto'

    def find_spec(self, name, path=None, target=None):
        if name != self.registry: return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            self.register(module)
        spec.loader.exec_module = exec_module
        return spec

    def register(self, module):
        for method in ('compecon', 'compecon (`import compecon` before loading)'):  # see compecon.settle.METHOD
            module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method, _Lazy('SettledConfig'))
            module.AUTO_QUANTIZER_MAPPING.setdefault(method, _Lazy('SettledQuantizer'))

    def start(self):
        if self.registry in sys.modules: self.register(sys.modules[self.registry])
        else: sys.meta_path.insert(0, self)


_Registration().start()
