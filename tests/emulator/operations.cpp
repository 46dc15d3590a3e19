// What PyTorch's operations do on the emulated device: the CPU's kernel computes each, when runtime.cpp comes to it.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

extern "C" cudaError_t emulator_give(cudaStream_t stream, std::function<void()>* work);
extern "C" bool emulator_is_pinned(const void* pointer);
extern "C" bool emulator_looking();
extern "C" void emulator_waits();
extern "C" std::pair<bool, bool> emulator_look(bool begin, bool waits);

namespace {

const c10::DispatchKeySet kModes({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});

// Operations of the CPU without a tape and unseen by a TorchDispatchMode.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard unseen{kModes};
};

void give(std::function<void()> work) {
  std::function<void()> plain = [work = std::move(work)] {
    Plain guard;
    work();
  };
  C10_CUDA_CHECK(emulator_give(c10::cuda::getCurrentCUDAStream(), &plain));
}
void wait_for_stream() {
  if (emulator_looking()) return emulator_waits();
  C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
}

at::TensorOptions on_host(const Tensor& tensor) { return at::TensorOptions().dtype(tensor.dtype()); }
at::TensorOptions on_device(const Tensor& tensor) {
  return on_host(tensor).device(at::kCUDA, c10::cuda::current_device());
}

// The same memory as a tensor of the CPU; a tensor of the CPU goes into a kernel by its present value.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!tensor.is_cuda()) {
    Tensor value = tensor.detach().clone();
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) value.unsafeGetTensorImpl()->set_wrapped_number(true);
    return value;
  }
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), on_host(tensor));
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), on_host(tensor));
}
// Of the same shape, with values that are legal wherever an index is asked for.
Tensor zeros(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return host(tensor);
  if (!tensor.is_non_overlapping_and_dense()) return at::zeros(tensor.sizes(), on_host(tensor));
  return at::empty_strided(tensor.sizes(), tensor.strides(), on_host(tensor)).zero_();
}
Tensor empty(const Tensor& tensor) { return at::empty({0}, on_host(tensor)); }

Tensor shape_of(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), on_host(tensor).device(at::kMeta));
}

IValue each(const IValue& value, const std::function<Tensor(const Tensor&)>& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const auto& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    return changed;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return at::Device(at::kCPU);
  return value;
}

// What a random operation draws from: as on a GPU, in a graph the generator's state is read when the graph is replayed.
class Draw {
 public:
  explicit Draw(at::Generator generator) {
    auto* cuda = at::check_generator<at::CUDAGeneratorImpl>(generator);
    std::lock_guard<std::mutex> lock(cuda->mutex_);
    state_ = cuda->philox_cuda_state(4);
  }
  uint64_t seed() const {
    uint64_t seed = state_.captured_ ? uint64_t(*state_.seed_.ptr) : state_.seed_.val;
    uint64_t offset = state_.captured_ ? uint64_t(*state_.offset_.ptr) + state_.offset_intragraph_ : state_.offset_.val;
    return seed * 0x9E3779B97F4A7C15ull ^ (offset + 1) * 0xBF58476D1CE4E5B9ull;
  }

 private:
  at::PhiloxCudaState state_;
};

void call(const c10::OperatorHandle& operation, Stack& stack, const std::optional<Draw>& draw) {
  Plain guard;
  if (!draw) return operation.callBoxed(&stack);
  const auto& arguments = operation.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++)
    if (arguments[i].name() == "generator") {
      stack[i] = at::make_generator<at::CPUGeneratorImpl>(draw->seed());
      return operation.callBoxed(&stack);
    }
  // Some, like native_dropout, take the global generator.
  at::Generator global = at::detail::getDefaultCPUGenerator();
  Tensor before = global.get_state();
  global.set_current_seed(draw->seed());
  operation.callBoxed(&stack);
  global.set_state(before);
}

// Operations whose result's size, or whose result, is for the host to know: a GPU is waited for.
const std::set<std::string> kWaiting = {"aten::nonzero",     "aten::masked_select",       "aten::_unique2",
                                        "aten::unique_dim",  "aten::unique_consecutive",  "aten::bincount",
                                        "aten::equal",       "aten::repeat_interleave"};

std::string described(const c10::FunctionSchema& schema, const std::vector<IValue>& given) {
  std::ostringstream out;
  const at::Context& settings = at::globalContext();
  out << schema.operator_name() << settings.deterministicAlgorithms() << settings.deterministicAlgorithmsWarnOnly();
  for (const IValue& value : given) {
    bool tensors = value.isTensor() || value.isTensorList() || value.isOptionalTensorList();
    out << ';';
    if (!tensors && !value.isGenerator()) out << value;
    each(value, [&](const Tensor& tensor) {
      out << '/' << tensor.defined();
      if (tensor.defined())
        out << tensor.dtype() << tensor.device().type() << tensor.sizes() << tensor.strides()
            << tensor.unsafeGetTensorImpl()->is_wrapped_number();
      return tensor;
    });
  }
  return out.str();
}

bool by_mask(const std::vector<IValue>& given) {
  for (const IValue& value : given)
    if (value.isOptionalTensorList())
      for (const auto& index : value.toOptionalTensorVector())
        if (index && index->scalar_type() == at::kBool) return true;
  return false;
}

// CUDA's kernels, by the operation, as they were before `install`.
std::unordered_map<c10::OperatorName, c10::SafeKernelFunction>& originals() {
  static auto* it = new std::unordered_map<c10::OperatorName, c10::SafeKernelFunction>;
  return *it;
}

// What CUDA's own code for an operation does before its kernels, by running it without them: whether it waits for the
// device. Where there is no deterministic way, and one is asked for, it says so (c10::Error).
bool look(const c10::OperatorHandle& operation, const std::vector<IValue>& given) {
  auto original = originals().find(operation.operator_name());
  if (original == originals().end()) return false;
  auto before = emulator_look(true, false);
  std::exception_ptr refused;
  try {
    Plain guard;
    Stack stack(given.begin(), given.end());
    original->second.callBoxed(operation, c10::DispatchKeySet(DispatchKey::CUDA), &stack);
  } catch (const std::exception& error) {
    // Any other is of a library of NVIDIA's, which has no device here.
    for (const char* alert : {"does not have a deterministic implementation", "is not deterministic because"})
      if (std::strstr(error.what(), alert)) refused = std::current_exception();
  }
  bool waits = emulator_look(before.first, before.second).second;
  if (refused) std::rethrow_exception(refused);
  return waits;
}

// The same, once for operations that are alike in everything but values.
bool looked_at(const c10::OperatorHandle& operation, const std::vector<IValue>& given, const std::string& key) {
  static std::map<std::string, bool> known;
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = known.find(key); found != known.end()) return found->second;
  }
  bool waits = look(operation, given);
  std::lock_guard<std::mutex> lock(mutex);
  return known[key] = waits;
}

void compute(const c10::OperatorHandle& operation, Stack* stack) {
  const auto& schema = operation.schema();
  const auto& arguments = schema.arguments();
  const auto& returns = schema.returns();
  std::vector<IValue> given(stack->end() - long(arguments.size()), stack->end());
  stack->erase(stack->end() - long(arguments.size()), stack->end());
  bool waits = kWaiting.count(schema.name()) || by_mask(given);
  std::string key = described(schema, given);
  bool draws = operation.hasTag(at::Tag::nondeterministic_seeded);
  if ((!draws && looked_at(operation, given, key)) || waits) wait_for_stream();

  std::optional<Draw> draw;
  if (draws) {
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator();
    for (size_t i = 0; i < arguments.size(); i++)
      if (arguments[i].name() == "generator" && given[i].isGenerator()) generator = given[i].toGenerator();
    draw.emplace(generator);
  }

  // The results' shapes, from a try on other tensors.
  bool makes_some = std::any_of(returns.begin(), returns.end(), [](const auto& it) { return !it.alias_info(); });
  bool fills_some = std::any_of(arguments.begin(), arguments.end(), [](const auto& it) { return it.is_out(); });
  Stack tried;
  if (makes_some || fills_some) {
    static std::map<std::string, Stack> known;  // by everything but values
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = known.find(key); !waits && found != known.end()) {
      tried = found->second;
    } else {
      for (size_t i = 0; i < arguments.size(); i++)
        tried.push_back(each(given[i], arguments[i].is_out() ? empty : waits ? host : zeros));
      call(operation, tried, draw);
      for (IValue& result : tried) result = each(result, shape_of);
      if (!waits) known[key] = tried;
    }
  }
  for (size_t i = 0, result = 0; i < arguments.size(); i++)
    if (arguments[i].is_out() && given[i].isTensor()) {
      Tensor out = given[i].toTensor(), wanted = tried[result++].toTensor();
      if (out.sizes() != wanted.sizes()) out.resize_(wanted.sizes());
    }

  std::vector<IValue> inputs;
  for (const IValue& value : given) inputs.push_back(each(value, host));
  std::vector<std::vector<Tensor>> made(returns.size());
  for (size_t result = 0; result < returns.size(); result++) {
    if (const auto* same = returns[result].alias_info()) {
      for (size_t i = 0; i < arguments.size(); i++)
        if (arguments[i].alias_info() && *arguments[i].alias_info() == *same) {
          stack->push_back(given[i]);
          break;
        }
      continue;
    }
    stack->push_back(each(tried[result], [&](const Tensor& shape) -> Tensor {
      if (!shape.defined()) return made[result].emplace_back();
      Tensor fresh = shape.is_non_overlapping_and_dense()
                         ? at::empty_strided(shape.sizes(), shape.strides(), on_device(shape))
                         : at::empty(shape.sizes(), on_device(shape));
      made[result].push_back(host(fresh));
      return fresh;
    }));
  }
  give([=] {
    Stack work(inputs.begin(), inputs.end());
    call(operation, work, draw);
    for (size_t result = 0; result < made.size(); result++) {
      size_t number = 0;
      if (!made[result].empty())
        each(work[result], [&](const Tensor& value) {
          Tensor into = made[result][number++];
          if (into.defined() && into.numel()) into.copy_(value);
          return value;
        });
    }
  });
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.numel()) return self;
  const Tensor* outside = !self.is_cuda() ? &self : !source.is_cuda() ? &source : nullptr;
  bool waits = outside && !(non_blocking && emulator_is_pinned(outside->data_ptr()));
  if (emulator_looking()) {
    if (waits) emulator_waits();
    return self;
  }
  Tensor from = outside == &source && !waits ? source : host(source), to = self.is_cuda() ? host(self) : self;
  give([=] { Tensor(to).copy_(from); });
  if (waits) wait_for_stream();
  return self;
}

// ---------------------------------------------------------------- in the place of CUDA's kernels

// They compute nothing: they make tensors, look at them another way, or bring a value to the host.
const std::set<std::string> kLeft = {
    "empty",        "empty_strided", "as_strided",   "view",      "_reshape_alias",  "set_",   "resize_",
    "resize_as_",   "record_stream", "is_set_to",    "is_pinned", "_pin_memory",     "unfold", "view_as_real",
    "_to_copy",     "copy_",         "_copy_from",   "item",      "view_as_complex", "isnan",  "_resize_output_",
    "_assert_async", "allclose",     "_local_scalar_dense",       "_efficientzerotensor",      "_fused_sdp_choice"};

void install() {
  // Kept: a library takes its kernels along when it goes.
  auto& library = *new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto operation = dispatcher.findSchema(name);
    if (name.name.rfind("aten::", 0) || !operation) continue;
    std::string base = name.name.substr(6), full = name.overload_name.empty() ? base : base + "." + name.overload_name;
    auto has = [&](DispatchKey key) { return operation->hasKernelForDispatchKey(key); };
    const auto& returns = operation->schema().returns();
    bool looks = std::any_of(returns.begin(), returns.end(),
                             [](const auto& it) { return it.alias_info() && !it.alias_info()->isWrite(); });
    bool whole = full == "convolution" || full == "convolution_backward";  // before they choose a library
    bool computes = has(DispatchKey::CUDA) && !looks && !kLeft.count(base);
    bool known = has(DispatchKey::CPU) || has(DispatchKey::CompositeExplicitAutograd) ||
                 has(DispatchKey::CompositeImplicitAutograd) ||
                 has(DispatchKey::CompositeExplicitAutogradNonFunctional);
    if (computes && known) originals().emplace(name, operation->getComputedKernelForDispatchKey(DispatchKey::CUDA));
    if (whole || (computes && known)) library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
  library.impl("copy_", TORCH_FN(copy_));
}

}  // namespace

PYBIND11_MODULE(emulator_operations, module) { module.def("install", &install); }
