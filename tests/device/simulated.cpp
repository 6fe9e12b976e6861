// SPDX-License-Identifier: Apache-2.0
// Two CUDA devices in a CPU build of torch, "cuda:0" and "cuda:1". See simulated.py, which builds and loads this.
//
// A CPU build has no kernels for the dispatch key CUDA. A boxed fallback stands there: it gives the CPU's kernel tensors
// over the same memory, and hands the results back as tensors on the device. All else is what torch asks of a backend:
// an allocator, a generator for each device, a device guard, hooks.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <set>

using namespace at;
using c10::DeviceIndex, c10::List;

constexpr auto DT = kCUDA;
constexpr int COUNT = 2;

static thread_local DeviceIndex current = 0;
static bool signs = false;  // give singular vectors and eigenvectors the other sign than LAPACK, as cuSOLVER may
static void (*callback)(const char* op, const char* kind) = nullptr;

static void tell(const char* op, const char* kind) {
  if (callback) callback(op, kind);
}

static DeviceIndex exchange(DeviceIndex i) {
  auto before = current;
  if (i >= 0) current = i;
  return before;
}

// --- what torch asks of a backend

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DT; }
  Device exchangeDevice(Device d) const override { return {DT, exchange(d.index())}; }
  Device getDevice() const override { return {DT, current}; }
  void setDevice(Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { exchange(d.index()); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d.has_index() ? d : getDevice()); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
static c10::impl::DeviceGuardImplRegistrar guard(DT, new Guard());

struct Alloc final : c10::Allocator {
  DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &c10::free_cpu, Device(DT, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};
static Alloc alloc;
static int registered = (c10::SetAllocator(DT, &alloc, 10), 0);

// Draws by a CPU generator inside; one seed gives other numbers than on the CPU, as on a GPU.
struct Gen final : c10::GeneratorImpl {
  uint64_t given = 1;
  Generator inner;
  explicit Gen(DeviceIndex i)
      : GeneratorImpl(Device(DT, i), DispatchKeySet(DispatchKey::CUDA)), inner(at::detail::createCPUGenerator(given)) {}
  void set_current_seed(uint64_t s) override {
    given = s;
    inner.set_current_seed(s ^ 0x5DEECE66DULL);
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return given; }
  uint64_t seed() override { return given = inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Gen* clone_impl() const override {
    auto g = new Gen(device().index());
    g->inner = inner.clone();
    return g;
  }
};

static Generator& default_generator(DeviceIndex i) {
  static Generator made[COUNT] = {make_generator<Gen>(0), make_generator<Gen>(1)};
  return made[i < 0 ? current : i];
}

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex i) const override { return default_generator(i); }
  Generator getNewGenerator(DeviceIndex i) const override { return make_generator<Gen>(i < 0 ? current : i); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  DeviceIndex deviceCount() const override { return COUNT; }
  int getNumGPUs() const override { return COUNT; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  void setCurrentDevice(DeviceIndex i) const override { exchange(i); }
  DeviceIndex exchangeDevice(DeviceIndex i) const override { return exchange(i); }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchange(i); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

// --- one memory, seen from two devices

static DataPtr held(const Storage& s, Device d) {
  return {s.mutable_data(), new Storage(s), [](void* c) { delete static_cast<Storage*>(c); }, d};
}

static Storage share(const Storage& s, Device d, c10::Allocator* a) {
  return Storage(Storage::use_byte_size_t{}, s.nbytes(), held(s, d), a, true);
}

static Tensor made(Storage s, const Tensor& like, DispatchKey key) {
  auto r = at::detail::make_tensor<TensorImpl>(std::move(s), DispatchKeySet(key), like.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) r._set_conj(true);
  if (like.is_neg()) r._set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}

// The arguments of one call, as CPU tensors over the same memory, and the way back.
struct Lowered {
  const char* op;
  std::vector<std::pair<Tensor, Tensor>> pairs;
  std::optional<Device> device;

  Tensor down(const Tensor& t, bool lenient) {
    if (!t.defined()) return t;
    const bool ours = t.device().type() == DT, apart = !ours || (device && *device != t.device());
    TORCH_CHECK(!apart || (lenient && !t.is_meta()) || (t.is_cpu() && t.dim() == 0),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                device ? device->str() : "cuda:0", " and ", t.device(), "! (", op, ")");
    if (!ours) return t;
    if (!device) device = t.device();
    Storage s;
    for (auto& [was, now] : pairs) {
      if (was.is_same(t)) return now;
      if (was.storage().is_alias_of(t.storage())) s = now.storage();
    }
    pairs.emplace_back(t, made(s ? s : share(t.storage(), kCPU, c10::GetCPUAllocator()), t, DispatchKey::CPU));
    return pairs.back().second;
  }

  void settle() {  // what the call did to sizes and storages
    for (auto& [was, now] : pairs) {
      auto* kept = was.storage().unsafeGetStorageImpl();
      const auto n = now.storage().nbytes();
      if (now.storage().data() != kept->data() || n != kept->nbytes()) {
        kept->set_data_ptr_noswap(held(now.storage(), was.device()));
        kept->set_nbytes(n);
      }
      if (now.sizes() != was.sizes() || now.strides() != was.strides() || now.storage_offset() != was.storage_offset())
        was.unsafeGetTensorImpl()->set_sizes_and_strides(now.sizes(), now.strides(), now.storage_offset());
    }
  }

  Tensor up(const Tensor& t) {
    if (!t.defined() || t.device().type() != kCPU) return t;
    for (auto& p : pairs)
      if (p.second.is_same(t)) return p.first;
    for (auto& p : pairs)
      if (p.second.storage().is_alias_of(t.storage())) return made(p.first.storage(), t, DispatchKey::CUDA);
    return made(share(t.storage(), *device, &alloc), t, DispatchKey::CUDA);
  }
};

// --- the kernels

static const std::set<std::string> WAITS = {  // a GPU's kernels for these tell the host something
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive",
    "equal", "unique_dim_consecutive", "bincount", "repeat_interleave", "is_nonzero", "histc", "_linalg_svd",
    "linalg_eig", "_linalg_eigh", "linalg_lstsq"};
static const std::set<std::string> PUT = {"index_put_", "_index_put_impl_", "index_put", "_unsafe_index_put"};
static const std::set<std::string> GET = {"index", "_unsafe_index"};

static void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& args = op.schema().arguments();
  const auto full = op.schema().name();
  const auto name = full.substr(full.find("::") + 2);
  Lowered low{name.c_str()};
  const bool put = PUT.count(name), index = put || GET.count(name);
  bool waits = WAITS.count(name);
  std::optional<Device> asked;
  Generator gen;
  const auto first = stack->size() - args.size();
  if (name == "histc" && !(*stack)[first].toTensor().is_floating_point())  // CUDA counts whole numbers, a CPU does not
    (*stack)[first] = (*stack)[first].toTensor().to(kDouble);
  for (size_t i = 0; i < args.size(); i++) {
    IValue& v = (*stack)[first + i];
    if (v.isTensor()) {
      v = low.down(v.toTensor(), false);
    } else if (v.isTensorList()) {
      List<Tensor> l;
      for (const Tensor& t : v.toTensorVector()) l.push_back(low.down(t, false));
      v = l;
    } else if (v.isOptionalTensorList()) {
      List<std::optional<Tensor>> l;
      for (const auto& t : v.toOptionalTensorVector()) {
        const bool mask = t && t->defined() && (t->scalar_type() == kBool || t->scalar_type() == kByte);
        if (mask && !(put && (*stack)[first + 2].toTensor().numel() == 1)) waits = true;  // one value: masked_fill
        l.push_back(t ? std::optional<Tensor>(low.down(*t, index)) : t);
      }
      v = l;
    } else if (v.isDevice()) {
      asked = v.toDevice();
      v = Device(kCPU);
    } else if (v.isStorage()) {
      v = share(v.toStorage(), kCPU, c10::GetCPUAllocator());
    } else if (v.isGenerator() || (v.isNone() && args[i].type()->str() == "Generator?")) {
      const auto index = low.device ? low.device->index() : asked ? asked->index() : -1;
      gen = v.isGenerator() ? v.toGenerator() : default_generator(index);
      TORCH_CHECK(gen.device().type() == DT, "Expected a 'cuda' device type for generator but found '",
                  gen.device().type(), "' (", name, ")");
      v = gen.get<Gen>()->inner;
    }
  }
  if (!low.device)
    low.device = asked && asked->type() == DT && asked->has_index() ? *asked : Device(DT, current);
  if (waits) tell(name.c_str(), "sync");

  // an operator without a generator among its arguments draws by the CPU's default one: lend that our state
  const bool draws = !gen.defined() && op.hasTag(Tag::nondeterministic_seeded);
  auto cpu = at::detail::getDefaultCPUGenerator(), ours = default_generator(low.device->index()).get<Gen>()->inner;
  Tensor before;
  if (draws) {
    before = cpu.get_state();
    cpu.set_state(ours.get_state());
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (draws) {
    ours.set_state(cpu.get_state());
    cpu.set_state(before);
  }

  if (signs && (name == "_linalg_svd" || name == "_linalg_eigh")) {
    const auto n = stack->size();
    (*stack)[n - (name == "_linalg_svd" ? 3 : 1)].toTensor().slice(-1, 0, std::nullopt, 2).neg_();
    if (name == "_linalg_svd") (*stack)[n - 1].toTensor().slice(-2, 0, std::nullopt, 2).neg_();
  }
  low.settle();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) {
      v = low.up(v.toTensor());
    } else if (v.isTensorList()) {
      List<Tensor> l;
      for (const Tensor& t : v.toTensorVector()) l.push_back(low.up(t));
      v = l;
    }
  }
}

static Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  Lowered low{"copy_"};
  Tensor a = low.down(self, true), b = low.down(src, true);
  const bool ours = self.device().type() == DT, theirs = src.device().type() == DT;
  if (ours != theirs && !(non_blocking && ours)) tell("copy_", ours ? "h2d" : "d2h");
  a.copy_(b);
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy_);
  for (auto name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY(simulated, m) {
  m.def("default_generator(int i) -> Generator?", [](int64_t i) { return default_generator(i); });
  m.def("signs(int i) -> int", [](int64_t i) -> int64_t { return signs = i; });
  m.def("exchange(int i) -> int", [](int64_t i) -> int64_t { return exchange(i); });
}
extern "C" void simulated_callback(void (*f)(const char*, const char*)) { callback = f; }
