// Has a torch that sees no GPU take device "cuda" for there, so that autograd works on its fake tensors.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  long versionRuntimeCuDNN() const override { return 0; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kCUDA, 0));
  }
};

// Preferred to those that a torch built for CUDA registers later.
static at::RegistererCUDAHooksRegistry hooks("CUDAHooks", c10::REGISTRY_PREFERRED, at::CUDAHooksRegistry(),
                                             at::RegistererCUDAHooksRegistry::DefaultCreator<Hooks>);

extern "C" void pretend() { c10::impl::registerDeviceGuard(c10::kCUDA, new Guard); }
