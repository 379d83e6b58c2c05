// Proves on a device that an engine of a release computes what was validated, and prints what it detects.
//   qyolo_selftest RELEASE [VIEW] [SCORE]
// VIEW is an ONNX engine of the manifest (by default the quantized one); boxes with a score above SCORE (0.25) are
// printed. Exit codes as those of qyolo: 0 ok, 1 out of tolerance, 2 bad input, 4 integrity.

#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <map>

#include "detections.hpp"

namespace {

using detections::Detection;
using detections::Difference;

struct Tensor {
  std::vector<float> values;
  std::vector<std::int64_t> shape;
};

// x86 without VNNI adds two products of uint8 and int8 in 16 bits; with this ONNX Runtime does not let them saturate.
Ort::SessionOptions exact_options() {
  Ort::SessionOptions options;
  options.AddConfigEntry("session.x64quantprecision", "1");
  return options;
}

class Session {
 public:
  Session(const release::fs::path& file, std::string input)
      : input_(std::move(input)), session_(environment_, file.c_str(), exact_options()) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i)
      outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    const auto text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("raw_head", allocator);
    if (text) head_ = text.get();
  }

  const std::vector<std::string>& outputs() const { return outputs_; }
  const std::string& head() const { return head_; }  // empty where the engine decodes by itself

  std::vector<Tensor> run(std::vector<float> image, std::size_t height, std::size_t width) {
    const std::int64_t shape[] = {1, 3, static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto input = Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape, 4);
    const char* const input_name = input_.c_str();
    std::vector<const char*> names;
    for (const auto& name : outputs_) names.push_back(name.c_str());
    std::vector<Tensor> tensors;
    for (const auto& value : session_.Run({}, &input_name, &input, 1, names.data(), names.size())) {
      const auto info = value.GetTensorTypeAndShapeInfo();
      const float* data = value.GetTensorData<float>();
      tensors.push_back({{data, data + info.GetElementCount()}, info.GetShape()});
    }
    return tensors;
  }

 private:
  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "qyolo_selftest"};
  std::string input_, head_;
  std::vector<std::string> outputs_;
  Ort::Session session_;
};

// `[height, width, 3]` in 0..255 to `[3, height, width]` in 0..1.
std::vector<float> to_planes(const std::vector<std::uint8_t>& pixels) {
  const std::size_t area = pixels.size() / 3;
  std::vector<float> planes(pixels.size());
  for (std::size_t i = 0; i < area; ++i)
    for (std::size_t color = 0; color < 3; ++color) planes[color * area + i] = pixels[3 * i + color] / 255.0f;
  return planes;
}

std::vector<Detection> detect(const std::vector<Tensor>& tensors, const std::string& head,
                              const release::Postprocessing& post) {
  if (!head.empty()) {
    std::vector<heads::Map> maps;
    for (const auto& tensor : tensors) {
      if (tensor.shape.size() != 4) throw release::Error("a raw head map is not [1, C, h, w]");
      const auto side = [&](std::size_t axis) { return static_cast<std::size_t>(tensor.shape[axis]); };
      maps.push_back({tensor.values, side(1), side(2), side(3)});
    }
    return detections::decode(heads::Head(head).decode(maps, post.conf), post);
  }
  const auto& shape = tensors.at(0).shape;
  if (shape.size() != 3) throw release::Error("the engine's output is not [1, 4 + nc, A]");
  if (shape[2] == 6) return detections::decode_end_to_end(tensors[0].values, post);
  return detections::decode(detections::columns_of(tensors[0].values, shape[1], shape[2]), post);
}

Difference compare_outputs(const std::vector<std::string>& names, const std::vector<Tensor>& tensors,
                           const std::vector<release::GoldenOutput>& golden) {
  Difference worst;
  for (const auto& output : golden) {
    const auto place = std::find(names.begin(), names.end(), output.name);
    if (place == names.end()) throw release::Error("the engine has no output '" + output.name + "'");
    const auto& values = tensors[place - names.begin()].values;
    if (values.size() != output.size) throw release::Error("the output '" + output.name + "' has another shape");
    worst.worsen({detections::relative_error(values, output), 0, 1});
  }
  return worst;
}

void print_boxes(const std::vector<Detection>& found, const std::vector<std::string>& names, float above) {
  for (const auto& box : found)
    if (box.score > above)
      std::printf("  %-20s %.3f  x1 %.1f y1 %.1f x2 %.1f y2 %.1f\n", names.at(box.label).c_str(), box.score, box.x1,
                  box.y1, box.x2, box.y2);
}

int check(const release::fs::path& root, const std::string& view, float above) {
  const release::Manifest manifest(root);
  const auto engine = manifest.engine(view);
  const auto golden = manifest.golden(engine.view);
  Session session(engine.path, manifest.input_name());
  std::printf("%s, engine %s, ONNX Runtime %s\n", manifest.title().c_str(), engine.view.c_str(),
              Ort::GetVersionString().c_str());
  Difference worst;
  for (const auto& vector : golden.vectors) {
    const auto tensors = session.run(to_planes(vector.pixels), vector.height, vector.width);
    const auto found = detect(tensors, session.head(), manifest.postprocessing());
    worst.worsen(compare_outputs(session.outputs(), tensors, vector.outputs));
    worst.worsen(detections::compare(found, vector.detections, golden.compared));
    std::printf("%zu x %zu pixels\n", vector.width, vector.height);
    print_boxes(found, manifest.names(), above);
  }
  const bool passed = worst.within(golden.tolerance);
  std::printf("%s: relative error %.3g (at most %.3g), score %.3g (%.3g), IoU %.4f (at least %.4f)\n",
              passed ? "passed" : "out of tolerance", worst.relative_error, golden.tolerance.relative_error, worst.score,
              golden.tolerance.score, worst.iou, golden.tolerance.iou);
  return passed ? 0 : 1;
}

int fail(const std::string& reason, int code) {
  std::fprintf(stderr, "error: %s\n", reason.c_str());
  return code;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2 || count > 4) return fail("usage: qyolo_selftest RELEASE [VIEW] [SCORE]", 2);
  char* behind = nullptr;
  const float above = count > 3 ? std::strtof(arguments[3], &behind) : 0.25f;
  if (behind && (*behind || behind == arguments[3])) return fail("SCORE is a number such as 0.25", 2);
  try {
    return check(arguments[1], count > 2 ? arguments[2] : "", above);
  } catch (const release::Error& error) {
    return fail(error.what(), 4);
  } catch (const json::Error& error) {
    return fail(std::string("the release's description is not valid: ") + error.what(), 4);
  } catch (const Ort::Exception& error) {
    return fail(error.what(), 2);
  } catch (const std::exception& error) {
    return fail(error.what(), 4);
  }
}
