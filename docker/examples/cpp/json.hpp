// Reads JSON: all of RFC 8259, except that text stays in UTF-8 as it came and \u escapes outside ASCII become '?'.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace json {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Value {
 public:
  enum class Kind { null, boolean, number, text, list, object };

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string text;
  std::vector<Value> list;
  std::map<std::string, Value> object;

  bool is_null() const { return kind == Kind::null; }
  bool has(const std::string& key) const { return object.count(key) != 0; }

  const Value& operator[](const std::string& key) const {
    const auto found = object.find(key);
    if (found == object.end()) throw Error("there is no key '" + key + "'");
    return found->second;
  }

  const std::string& as_text() const { return expect(Kind::text, "text"), text; }
  const std::vector<Value>& as_list() const { return expect(Kind::list, "a list"), list; }
  double as_number() const { return expect(Kind::number, "a number"), number; }
  bool as_bool() const { return expect(Kind::boolean, "true or false"), boolean; }

  std::size_t as_count() const {
    const double value = as_number();
    if (value < 0 || value > 4e9 || value != static_cast<double>(static_cast<std::size_t>(value)))
      throw Error("expected a whole number");
    return static_cast<std::size_t>(value);
  }

 private:
  void expect(Kind wanted, const char* words) const {
    if (kind != wanted) throw Error(std::string("expected ") + words);
  }
};

class Parser {
 public:
  explicit Parser(const std::string& source) : at_(source.c_str()), end_(at_ + source.size()) {}

  Value parse() {
    Value value = parse_value(0);
    skip_space();
    if (at_ != end_) throw Error("there is something behind the end");
    return value;
  }

 private:
  static constexpr int max_depth = 100;
  const char* at_;
  const char* end_;

  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  char peek() {
    skip_space();
    if (at_ == end_) throw Error("it ends too early");
    return *at_;
  }

  void take(const char* word) {
    for (; *word; ++word, ++at_)
      if (at_ == end_ || *at_ != *word) throw Error(std::string("expected '") + word + "'");
  }

  bool take_if(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  Value parse_value(int depth) {
    if (depth > max_depth) throw Error("it is nested too deeply");
    Value value;
    switch (peek()) {
      case '{': parse_object(value, depth); break;
      case '[': parse_list(value, depth); break;
      case '"': value.kind = Value::Kind::text; value.text = parse_text(); break;
      case 't': take("true"); value.kind = Value::Kind::boolean; value.boolean = true; break;
      case 'f': take("false"); value.kind = Value::Kind::boolean; break;
      case 'n': take("null"); break;
      default: parse_number(value);
    }
    return value;
  }

  void parse_object(Value& value, int depth) {
    value.kind = Value::Kind::object;
    ++at_;
    if (take_if('}')) return;
    do {
      if (peek() != '"') throw Error("expected a key");
      const std::string key = parse_text();
      peek();
      take(":");
      if (!value.object.emplace(key, parse_value(depth + 1)).second) throw Error("the key '" + key + "' comes twice");
    } while (take_if(','));
    take("}");
  }

  void parse_list(Value& value, int depth) {
    value.kind = Value::Kind::list;
    ++at_;
    if (take_if(']')) return;
    do value.list.push_back(parse_value(depth + 1));
    while (take_if(','));
    take("]");
  }

  void parse_number(Value& value) {
    // The source is a std::string, so a zero byte stops strtod at its end.
    char* behind = nullptr;
    if (*at_ != '-' && (*at_ < '0' || *at_ > '9')) throw Error("expected a value");
    value.kind = Value::Kind::number;
    value.number = std::strtod(at_, &behind);
    if (behind == at_) throw Error("expected a number");
    at_ = behind;
  }

  std::string parse_text() {
    std::string text;
    for (++at_; at_ != end_ && *at_ != '"'; ++at_) {
      if (static_cast<unsigned char>(*at_) < 0x20) throw Error("there is a control character in a text");
      if (*at_ != '\\') {
        text += *at_;
      } else if (++at_ != end_) {
        text += parse_escape();
      }
    }
    take("\"");
    return text;
  }

  char parse_escape() {
    switch (*at_) {
      case 'b': return '\b';
      case 'f': return '\f';
      case 'n': return '\n';
      case 'r': return '\r';
      case 't': return '\t';
      case '"': case '\\': case '/': return *at_;
      case 'u': break;
      default: throw Error("there is an unknown escape in a text");
    }
    if (end_ - at_ < 5) throw Error("it ends too early");
    const std::string digits(at_ + 1, at_ + 5);
    if (digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) throw Error("\\u needs four digits");
    const long code = std::strtol(digits.c_str(), nullptr, 16);
    at_ += 4;
    return code < 0x80 ? static_cast<char>(code) : '?';
  }
};

}  // namespace json
